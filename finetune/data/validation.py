"""The report on an uploaded file: what it holds, how much of it, and what is wrong with it, each with its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from finetune import recipe
from finetune.data.archives import Archive
from finetune.data.chats import COMPLETION, MESSAGES, PROMPT, holds_chats
from finetune.data.checked import check
from finetune.data.datasets import MOST_BROKEN
from finetune.data.items import Kind, open_file, source_of, unlabelled
from finetune.data.lines import Lines
from finetune.data.problems import BadFile, Problem
from finetune.data.series import holds_series
from finetune.data.tables import Table, number_of, text_of
from finetune.data.targets import labels_in
from finetune.data.wanted import CHATS, NOTHING, Column, Wanted, wanted_of
from finetune.recipe import CrossEntropy, Data

MOST_LISTED = 100
# A column with more distinct values than this is no label.
MOST_LABELS = 10_000
NO_CHATS = (
    f"the file holds no conversations: lines of {{{MESSAGES!r}: [...]}}, or columns {PROMPT!r} and {COMPLETION!r}"
)
ONLY_CHATS = "the file holds conversations, which the objective chat learns and no other: take a model that can chat"
NO_CLASSES = f"is no label of classes: it holds lists, or nothing, or more than {MOST_LABELS:,} different values"


# A table of texts and their translations, or of prompts and completions, is read as "text" when one of its columns is
# learned for itself.
Holding = Kind | Literal["pairs", "chats"]


class Duplicate(msgspec.Struct, frozen=True):
    """Two places with the same content and label."""

    place: str
    first: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `inspect` found. Lists are cut at 100; `problem_count` and `duplicate_count` count all.

    kind: "pairs" for texts with a translation each, in the columns of these names; "chats" for conversations, or
        prompts and completions, as OpenAI's fine-tuning takes them.
    label_counts: items of each label, for every column that could be the label column ("label" for class folders).
    classes: those of the column "label", usable items only; of sets of labels, how many have each. items: usable ones.
    numeric: columns that hold numbers.
    """

    kind: Holding
    format: str
    columns: list[str]
    items: int
    classes: dict[str, int]
    label_counts: dict[str, dict[str, int]]
    features: list[str]
    problems: list[Problem]
    problem_count: int
    duplicates: list[Duplicate]
    duplicate_count: int
    bytes: int
    numeric: list[str] = []


def inspect(path: Path, filename: str) -> Report:
    """Read a whole file. Raises BadFile when nothing in it could be used.

    Columns are taken to be called as `recipe.Data` has it by default; a table with other names is described by its
    columns and `label_counts`, and judged when a job names them.
    """
    data = Data()
    wanted = wanted_of(CrossEntropy(), data)
    opened = open_file(path, filename)
    if isinstance(opened, Lines):
        wanted = CHATS
    elif isinstance(opened, Table):
        if len(opened) == 0:
            raise BadFile(f"{filename}: has column names and no rows")
        if data.label_column not in opened.columns and {data.text_column, data.translation_column} <= {*opened.columns}:
            wanted = wanted_of(recipe.Translation(), data)
        elif not {data.text_column, data.label_column} & {*opened.columns} and holds_chats(opened):
            wanted = CHATS
        elif data.label_column not in opened.columns or not _default_columns(opened, data):
            return _described(path, opened)
        elif any(isinstance(cell, list) for cell in opened.columns[data.label_column]):
            wanted = wanted_of(recipe.MultiLabel(), data)
    if isinstance(opened, Archive) and unlabelled(opened):
        wanted = NOTHING
    source = source_of(opened, filename, data, wanted)
    checked = check(source)
    if not checked.good:
        first = checked.problems[0]
        raise BadFile(f"{filename}: no item can be used; the first: {first.place}: {first.message}")
    classes: Counter[str] = Counter()
    if wanted.kind in ("class", "set"):
        classes.update(label for i in checked.good for label in labels_in(source.answers[i][0], wanted.columns[0]))
    return Report(
        kind="pairs" if wanted.kind == "text" else "chats" if wanted.kind == "chat" else source.kind,
        format=source.form,
        columns=list(source.columns),
        items=len(checked.good),
        classes=_ordered(classes),
        label_counts=({} if wanted.kind == "chat" else _label_counts(source.columns))
        | ({data.label_column: _ordered(classes)} if wanted.kind in ("class", "nothing") else {}),
        features=source.features,
        problems=checked.problems[:MOST_LISTED],
        problem_count=len(checked.problems),
        duplicates=[Duplicate(source.places[i], source.places[j]) for i, j in checked.duplicates[:MOST_LISTED]],
        duplicate_count=len(checked.duplicates),
        bytes=path.stat().st_size,
        numeric=_numeric_columns(source.columns),
    )


def kind_of(report: Report, data: Data, wanted: Wanted) -> Holding:
    """What a job finds in a file: that is plainer once it is known which columns are learned."""
    if report.kind in ("images", "series") or not report.columns:
        return report.kind
    if data.text_column in report.columns:
        return "pairs" if report.kind == "pairs" else "text"
    learned = {data.label_column, *(column.name for column in wanted.columns)}
    rest = set(report.columns) - learned
    return "table" if rest and rest <= set(report.numeric) else report.kind


def holds_conversations(path: Path, filename: str, data: Data) -> bool:
    """Whether a file is one of conversations for a job that does not say what it learns, as `kind_of` finds it."""
    opened = open_file(path, filename)
    if isinstance(opened, Table):
        labelled = {Data().text_column, Data().label_column, data.text_column} & {*opened.columns}
        return not labelled and holds_chats(opened)
    return isinstance(opened, Lines)


def usable(report: Report, data: Data, wanted: Wanted | None = None) -> list[str]:
    """Why a job cannot learn from the file; empty when it can. wanted: classes in the label column when None."""
    wanted = wanted or wanted_of(CrossEntropy(), data)
    if wanted.kind == "chat":
        if report.kind != "chats" and not {PROMPT, COMPLETION} <= {*report.columns}:
            return [NO_CHATS]
        items = report.items + report.problem_count
        if report.kind == "chats" and report.problem_count > MOST_BROKEN * items:
            first = report.problems[0]
            told = f"{report.problem_count:,} of {items:,} conversations cannot be used, more than a tenth"
            return [f"{told}; the first: {first.place}: {first.message}"]
        return []
    if report.kind == "chats" and report.columns == [MESSAGES]:
        return [ONLY_CHATS]
    reasons: list[str] = []
    needed = [column.name for column in wanted.columns] if report.columns else []
    kind = kind_of(report, data, wanted)
    if kind == "images" and report.columns:
        needed.append(data.image_column)
    if kind in ("text", "pairs", "chats") and not (data.text_column == Data().text_column and report.features):
        needed.append(data.text_column)
    if kind == "series":
        needed.append(data.series_column)
    for name in needed:
        if name not in report.columns:
            reasons.append(f"there is no column {name!r}; the columns are {', '.join(map(repr, report.columns))}")
    if wanted.kind not in ("class", "nothing") and kind == "images" and not report.columns:
        reasons.append("class folders name one class an image; put a table with the labels at the archive's top")
    if reasons or wanted.kind != "class":
        return reasons or [reason for one in wanted.columns if (reason := unfit(report, one))]
    counts = labels(report, data)
    if counts is None:
        return [f"column {data.label_column!r} {NO_CLASSES}"]
    if not counts:
        return ["the images lie in no class folders and no table names their classes; they have no labels to learn"]
    if len(counts) < 2:
        only = next(iter(counts), None)
        return [f"there is only one class, {only!r}; a classifier needs at least two"]
    alone = sorted(label for label, count in counts.items() if count < 2)
    if alone:
        return [f"class {alone[0]!r} has a single item; every class needs one to train on and one to validate on"]
    return []


def unfit(report: Report, column: Column) -> str | None:
    """Why numbers, or the classes of one of several heads, cannot be learned from a column; None when they may."""
    counts = report.label_counts.get(column.name)
    if column.meaning == "number" and counts and all(number_of(value) is None for value in counts):
        return f"column {column.name!r} holds no numbers"
    if column.meaning == "class" and counts is None:
        return f"column {column.name!r} {NO_CLASSES}"
    if column.meaning == "class" and len(counts or ()) < 2:
        return f"column {column.name!r} holds only one class, {next(iter(counts or ()), 'none')!r}"
    return None


def labels(report: Report, data: Data) -> Mapping[str, int] | None:
    """Items of each label in the column that `data` names; None when that column is no label."""
    return report.label_counts.get(data.label_column if report.columns else "label")


def _default_columns(table: Table, data: Data) -> bool:
    """Whether the table reads as texts, series or vectors with the columns that `data` has by default."""
    if data.text_column in table.columns or holds_series(table.columns.get(data.series_column, [])):
        return True
    return (
        all(name == data.label_column or _numeric(values) for name, values in table.columns.items())
        and len(table.columns) > 1
    )


def _described(path: Path, table: Table) -> Report:
    counts = _label_counts(table.columns)
    words = [name for name, values in table.columns.items() if not _numeric(values)]
    # Vectors, with a label beside them; but words that hardly recur are no label, they are texts labelled by a number.
    vectors = len(words) < len(table.columns) and (
        not words or (len(words) == 1 and 2 * len(counts.get(words[0], table.columns[words[0]])) <= len(table))
    )
    return Report(
        kind="series" if any(map(holds_series, table.columns.values())) else "table" if vectors else "text",
        format=table.form,
        columns=list(table.columns),
        items=len(table),
        classes={},
        label_counts=counts,
        features=[],
        problems=[],
        problem_count=0,
        duplicates=[],
        duplicate_count=0,
        bytes=path.stat().st_size,
        numeric=_numeric_columns(table.columns),
    )


def _numeric_columns(columns: Mapping[str, object]) -> list[str]:
    return [name for name, values in columns.items() if _numeric(values)]


def _numeric(values: object) -> bool:
    """Whether a column holds numbers, but for a few cells that are to be reported."""
    looked_at = values[:1000] if isinstance(values, list) else []
    return sum(number_of(value) is not None for value in looked_at) >= 0.9 * len(looked_at) > 0


def _label_counts(columns: Mapping[str, object]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, values in columns.items():
        assert isinstance(values, list)
        counts = Counter(label for value in values if (label := text_of(value)) is not None)
        # Nearly as many values as rows: an id, a text or a measurement.
        if 0 < len(counts) <= MOST_LABELS and (len(counts) <= 50 or 2 * len(counts) <= len(values)):
            found[name] = _ordered(counts)
    return found


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    return {label: counts[label] for label in sorted(counts)}
