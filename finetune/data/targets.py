"""From label cells as they are written to the numbers that are learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from finetune.data.problems import BadFile
from finetune.data.tables import number_of, text_of
from finetune.data.wanted import SEPARATOR, Column, Meaning, Wanted

FLOAT32_MOST = 3.4e38
MISSING = {
    "class": "the label is missing, or neither text nor a number",
    "number": "the label is missing, or no finite number",
    "set": "the label is neither text nor a list of texts",
    "several": "every label is missing, or one is of the wrong kind",
    "text": "the translation is empty, or no text",
}


@dataclass(frozen=True)
class Targets:
    """labels: of the classes, sorted, or the names of the numbers. heads: the same of each of several heads.

    values: int64 [items], the class; float32 [items, labels] of 0 and 1 for sets; float32 [items, numbers]; for several
    heads all of these side by side in float32 [items, columns], NaN where a cell is empty; str [items] as objects;
    int64 zeros for nothing and for chats.
    strata: int64 [items], the groups that a split divides evenly.
    """

    labels: list[str]
    values: np.ndarray
    strata: np.ndarray
    heads: dict[str, list[str]] = field(default_factory=dict)


def written(cells: Sequence[Any], wanted: Wanted) -> str | None:
    """The label of an item in words, equal for equal labels; None when it cannot be learned from."""
    if wanted.kind in ("nothing", "chat"):
        return ""
    if wanted.kind == "class":
        return text_of(cells[0])
    if wanted.kind == "text":
        return text_of(cells[0]) if isinstance(cells[0], str) else None
    found = [
        (column, _cell(cell, column.meaning))
        for cell, column in zip(cells, wanted.columns, strict=True)
        if column.required or not empty(cell)
    ]
    if not found or any(value is None for _, value in found):
        return None
    return "; ".join(
        f"{column.name} {', '.join(value) if isinstance(value, list) else value}" for column, value in found
    )


def labels_in(cell: Any, column: Column) -> list[str]:
    """The class, or the labels of the set, that a usable cell holds."""
    found = _cell(cell, column.meaning)
    return found if isinstance(found, list) else [found]


def empty(cell: Any) -> bool:
    """Whether a cell says nothing: null, NaN or blank. An empty list does say something."""
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def read(
    answers: Sequence[Sequence[Any]], wanted: Wanted, known: Targets | None, place: Callable[[int], str]
) -> Targets:
    """The targets of usable items, whose cells are `answers`.

    known: the training file's targets, for a validation file. Raises BadFile for a label that is not among those, at
    the `place` of the item, and for a file whose labels are all alike.
    """
    strata = np.zeros(len(answers), np.int64)
    if wanted.kind in ("nothing", "chat"):
        return Targets([], strata, strata)
    if wanted.kind == "class":
        labels = known.labels if known else _several([str(text_of(cells[0])) for cells in answers])
        classes = _classes([cells[0] for cells in answers], labels, place).astype(np.int64)
        return Targets(labels, classes, classes)
    if wanted.kind == "text":
        return Targets([], np.array([text_of(cells[0]) for cells in answers], object), strata)
    parts: list[np.ndarray] = []
    heads: dict[str, list[str]] = {}
    for head, group in groupby(enumerate(wanted.columns), lambda pair: pair[1].head):
        numbered = list(group)
        before = (known.heads[head] if head else known.labels) if known else None
        heads[head], part = _head([([cells[i] for cells in answers], column) for i, column in numbered], before, place)
        parts.append(part)
    values = np.concatenate(parts, axis=1)
    if wanted.kind == "several":
        return Targets([], values, strata, heads)
    return Targets(heads[""], values, strata)


def _head(
    columns: list[tuple[list[Any], Column]], before: list[str] | None, place: Callable[[int], str]
) -> tuple[list[str], np.ndarray]:
    """Labels and float32 [items, ...] of the columns of one head."""
    meaning = columns[0][1].meaning
    if meaning == "number":
        values = np.array(
            [[math.nan if empty(cell) else _cell(cell, "number") for cell in cells] for cells, _ in columns], np.float32
        )
        return [column.name for _, column in columns], values.T
    (cells, column), *more = columns
    if more:
        raise BadFile(f"head {column.head!r} has several columns; only numbers may have")
    if meaning == "class":
        labels = before or _several([text for cell in cells if (text := text_of(cell)) is not None], column)
        return labels, _classes(cells, labels, place)[:, None]
    sets = [None if empty(cell) and not column.required else _cell(cell, "set") for cell in cells]
    labels = before or sorted({label for one in sets for label in one or ()})
    if not labels:
        raise BadFile(f"column {column.name!r}: no item has a label")
    number = {label: i for i, label in enumerate(labels)}
    values = np.zeros((len(cells), len(labels)), np.float32)
    for i, one in enumerate(sets):
        if one is None:
            values[i] = math.nan
        for label in one or ():
            if label not in number:
                raise BadFile(f"{place(i)}: label {label!r} does not occur in the training file")
            values[i, number[label]] = 1.0
    return labels, values


def _classes(cells: Sequence[Any], labels: Sequence[str], place: Callable[[int], str]) -> np.ndarray:
    """float32 [items]: the number of each label, NaN where there is none."""
    number = {label: i for i, label in enumerate(labels)}
    found = np.full(len(cells), np.nan, np.float32)
    for i, cell in enumerate(cells):
        text = text_of(cell)
        if text is not None and text not in number:
            raise BadFile(f"{place(i)}: label {text!r} does not occur in the training file")
        if text is not None:
            found[i] = number[text]
    return found


def _several(written: Iterable[str], column: Column | None = None) -> list[str]:
    labels = sorted(set(written))
    if len(labels) < 2:
        where = f"column {column.name!r}: " if column else ""
        raise BadFile(f"{where}only one class, {', '.join(labels) or 'none'}; a classifier needs at least two")
    return labels


def _cell(cell: Any, meaning: Meaning) -> Any:
    """A str, a finite float or a sorted list of str; None when the cell holds no such thing."""
    if meaning == "class":
        return text_of(cell)
    if meaning == "number":
        number = number_of(cell)
        return number if number is not None and math.isfinite(number) and abs(number) < FLOAT32_MOST else None
    if isinstance(cell, list):
        texts = [text_of(one) for one in cell]
        return None if None in texts else sorted({text for text in texts if text})
    if isinstance(cell, dict | bytes):
        return None
    return sorted({part.strip() for part in (text_of(cell) or "").split(SEPARATOR) if part.strip()})
