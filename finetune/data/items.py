"""What a data file holds, item by item: where each lies, its label as written, and how to read it.

Images lie in an archive, in one folder a class or named by a table beside them; texts, series and vectors in a
table; conversations in a table, or in lines that are read one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from finetune.data.archives import Archive, open_archive
from finetune.data.chats import COMPLETION, MESSAGES, PROMPT, Chat, characters, chat_of, holds_chats, open_chats
from finetune.data.lines import Lines
from finetune.data.problems import BadFile, Problem
from finetune.data.series import holds_series, series_reader
from finetune.data.tables import Table, form_of, number_of, read_table, text_of
from finetune.data.targets import written
from finetune.data.wanted import Wanted
from finetune.recipe import Data

Kind = Literal["images", "text", "table", "series"]
MOST_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Source:
    """The items of a file, before any is judged.

    form: "zip", "tar", "csv", "jsonl" or "parquet". columns: of its table, none for class folders.
    places: one an item. answers: the cells of the label columns of each, in the order of `wanted`.
    read(i): bytes of an image, str, list of float, for a series float64 [length, channels], or a Chat; raises BadFile.
    features: names of the numeric columns of a "table". strays: items in no class.
    """

    kind: Kind
    form: str
    columns: dict[str, Any]
    places: list[str]
    wanted: Wanted
    answers: Sequence[Sequence[Any]]
    read: Callable[[int], Any]
    features: list[str]
    strays: list[Problem]

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def labels(self) -> list[str | None]:
        """Of each item in words; None where it is missing."""
        return [written(cells, self.wanted) for cells in self.answers]


def open_file(path: Path, filename: str) -> Archive | Lines | Table:
    """An archive of images, lines of conversations, or a table. Raises BadFile when it is none, or dangerous."""
    if path.stat().st_size == 0:
        raise BadFile(f"{filename}: empty, 0 bytes")
    return open_archive(path) or open_chats(path, filename) or read_table(path, filename)


def source_of(
    opened: Archive | Lines | Table, filename: str, data: Data, wanted: Wanted, features: Sequence[str] = ()
) -> Source:
    """The items of an opened file. features: columns of a vector's numbers; all but the labels when none is named.
    Raises BadFile when it lacks a column that is named, or holds no such items."""
    if isinstance(opened, Archive):
        return _images(opened, data, wanted)
    if wanted.kind == "chat":
        return _chats(opened, wanted)
    if isinstance(opened, Lines):
        raise BadFile(f"{filename}: holds conversations; the objective that learns them is chat")
    if data.text_column in opened.columns:
        return _texts(opened, data, wanted)
    if data.series_column in opened.columns and holds_series(opened.columns[data.series_column]):
        return _series(opened, data, wanted)
    return _vectors(opened, data, wanted, filename, features)


def column(table: Table, name: str) -> Any:
    """Raises BadFile naming the columns that are there."""
    if name not in table.columns:
        raise BadFile(f"there is no column {name!r}; the columns are {', '.join(map(repr, table.columns))}")
    return table.columns[name]


def unlabelled(archive: Archive) -> bool:
    """Whether no image of an archive lies in a class folder, and no table names their classes."""
    prefix = _common_folder(archive.members) if archive.members else ""
    inner = [name[len(prefix) :] for name in archive.members]
    return bool(inner) and not any("/" in name or form_of(name) for name in inner)


def answers(table: Table, wanted: Wanted) -> list[tuple[Any, ...]]:
    """The cells of the label columns, item by item. Raises BadFile when there is no such column."""
    if not wanted.columns:
        return [()] * len(table)
    return list(zip(*(column(table, one.name) for one in wanted.columns), strict=True))


def _images(archive: Archive, data: Data, wanted: Wanted) -> Source:
    if not archive.members:
        raise BadFile("the archive holds no files")
    prefix = _common_folder(archive.members)
    inner = {name[len(prefix) :]: name for name in archive.members}
    tables = [name for name in inner if "/" not in name and form_of(name)]
    if len(tables) > 1:
        raise BadFile(f"the archive has several tables at its top, {' and '.join(sorted(tables))}; leave one")
    if tables:
        return _listed_images(archive, inner, tables[0], data, wanted)
    if wanted.kind not in ("class", "nothing"):
        raise BadFile(
            f"class folders name one class an image; put a table at the archive's top, with a column "
            f"{data.image_column!r} and the columns {', '.join(repr(column.name) for column in wanted.columns)}"
        )
    labelled = wanted.kind == "class"
    strays = [Problem(inner[name], "lies in no class folder") for name in inner if labelled and "/" not in name]
    members = [name for name in inner if not labelled or "/" in name]
    if not members:
        raise BadFile("the archive has no class folders and no table: put each class's images in a folder of its own")
    return Source(
        kind="images",
        form=archive.form,
        columns={},
        places=[inner[name] for name in members],
        wanted=wanted,
        answers=[(PurePosixPath(name).parts[0],) for name in members],
        read=lambda i: archive.read(inner[members[i]]),
        features=[],
        strays=strays,
    )


def _listed_images(archive: Archive, inner: dict[str, str], name: str, data: Data, wanted: Wanted) -> Source:
    table = read_table(archive.read(inner[name]), name)
    paths = [text_of(value) for value in column(table, data.image_column)]

    def read(i: int) -> bytes:
        path = paths[i]
        if path is None:
            raise BadFile(f"column {data.image_column!r} is empty")
        if path not in inner:
            raise BadFile(f"{path}: not in the archive")
        return archive.read(inner[path])

    return Source(
        kind="images",
        form=archive.form,
        columns=table.columns,
        places=[f"{name} {table.place(i)}" for i in range(len(table))],
        wanted=wanted,
        answers=answers(table, wanted),
        read=read,
        features=[],
        strays=[],
    )


def _common_folder(members: list[str]) -> str:
    """The folder around everything, such as archivers add; not a lone class folder."""
    top = {PurePosixPath(name).parts[0] for name in members}
    if len(top) > 1:
        return ""
    prefix = f"{top.pop()}/"
    inside = [name.removeprefix(prefix) for name in members if name.startswith(prefix)]
    wraps = len(inside) == len(members) and any("/" in name or form_of(name) for name in inside)
    return prefix if wraps else ""


def _texts(table: Table, data: Data, wanted: Wanted) -> Source:
    texts = column(table, data.text_column)

    def read(i: int) -> str:
        if texts[i] is not None and not isinstance(texts[i], str):
            raise BadFile(f"column {data.text_column!r} holds {type(texts[i]).__name__}, not text")
        text = text_of(texts[i])
        if text is None:
            raise BadFile("the text is empty")
        if len(text) > MOST_CHARACTERS:
            raise BadFile(f"the text has {len(text):,} characters; at most {MOST_CHARACTERS:,} are taken")
        return text

    return Source(
        kind="text",
        form=table.form,
        columns=table.columns,
        places=[table.place(i) for i in range(len(table))],
        wanted=wanted,
        answers=answers(table, wanted),
        read=read,
        features=[],
        strays=[],
    )


def _chats(opened: Lines | Table, wanted: Wanted) -> Source:
    columns: dict[str, Any] = {MESSAGES: []}
    if isinstance(opened, Table):
        if not holds_chats(opened):
            there = ", ".join(map(repr, opened.columns))
            raise BadFile(
                f"there are no conversations: a column {MESSAGES!r} of lists, or {PROMPT!r} and {COMPLETION!r}; the "
                f"columns are {there}"
            )
        columns = opened.columns
    names = [MESSAGES] if MESSAGES in columns else [PROMPT, COMPLETION]

    def read(i: int) -> Chat:
        found = chat_of(opened.read(i) if isinstance(opened, Lines) else {name: columns[name][i] for name in names})
        if (length := characters(found)) > MOST_CHARACTERS:
            raise BadFile(f"the texts have {length:,} characters; at most {MOST_CHARACTERS:,} are taken")
        return found

    return Source(
        kind="text",
        form=opened.form if isinstance(opened, Table) else "jsonl",
        columns=columns,
        places=[opened.place(i) for i in range(len(opened))],
        wanted=wanted,
        answers=[()] * len(opened),
        read=read,
        features=[],
        strays=[],
    )


def _series(table: Table, data: Data, wanted: Wanted) -> Source:
    return Source(
        kind="series",
        form=table.form,
        columns=table.columns,
        places=[table.place(i) for i in range(len(table))],
        wanted=wanted,
        answers=answers(table, wanted),
        read=series_reader(column(table, data.series_column), data.series_column),
        features=[],
        strays=[],
    )


def _vectors(table: Table, data: Data, wanted: Wanted, filename: str, given: Sequence[str]) -> Source:
    cells = answers(table, wanted)
    labels = {data.label_column, *(column.name for column in wanted.columns)}
    features = list(given) or [name for name in table.columns if name not in labels]
    for name in given:
        column(table, name)
    if not features:
        raise BadFile(f"{filename}: there is nothing to learn from beside the label")
    if any(not name.strip() for name in features):
        raise BadFile(f"{filename}: a column has no name; if it is an index saved along, leave it out, else name it")
    for name in features:
        if not any(number_of(value) is not None for value in table.columns[name][:1000]):
            raise BadFile(
                f"column {name!r} holds no numbers. Texts are read from a column {data.text_column!r} "
                f"(data.text_column), series from a column {data.series_column!r} of lists (data.series_column), "
                f"vectors from columns of numbers; "
                f"the columns are {', '.join(map(repr, table.columns))}"
            )
    vectors = [table.columns[name] for name in features]

    def read(i: int) -> list[float]:
        found = [number_of(values[i]) for values in vectors]
        for name, value in zip(features, found, strict=True):
            if value is None or value != value or abs(value) > 3.4e38:
                raise BadFile(f"column {name!r} holds {repr(table.columns[name][i])[:80]}, not a finite number")
        return [value for value in found if value is not None]

    return Source(
        kind="table",
        form=table.form,
        columns=table.columns,
        places=[table.place(i) for i in range(len(table))],
        wanted=wanted,
        answers=cells,
        read=read,
        features=features,
        strays=[],
    )
