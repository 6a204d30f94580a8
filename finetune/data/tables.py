"""CSV, JSONL and Parquet files as columns of Python values."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import msgspec

from finetune.data.problems import BadFile

FORMS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Table:
    """`columns`: values by column name, all of equal length. `unit` and `first` say where value i stood in the file."""

    columns: dict[str, Sequence[Any]]
    form: str
    unit: str
    first: int

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def place(self, row: int) -> str:
        return f"{self.unit} {row + self.first}"


def form_of(filename: str) -> str | None:
    """ "csv", "jsonl" or "parquet" by the name's ending, None for another."""
    return FORMS.get(Path(filename).suffix.lower())


def read_table(source: Path | bytes, filename: str) -> Table:
    """The table in a file or in its bytes. Raises BadFile naming the line, row or byte that is wrong."""
    form = form_of(filename)
    if form is None:
        raise BadFile(f"{filename}: not a format that is read; send a zip or tar of images, or {', '.join(FORMS)}")
    stream: IO[bytes] = BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with stream:
        if form == "parquet":
            return _parquet(stream, filename)
        _check_utf8(stream, filename)
        return _csv(stream, filename) if form == "csv" else _jsonl(stream, filename)


def text_of(value: Any) -> str | None:
    """A cell as a label or text: None for an empty or missing one. A whole float is written without its point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def number_of(value: Any) -> float | None:
    """A cell as a number; None when it is none."""
    if isinstance(value, bool) or value is None:
        return float(value) if isinstance(value, bool) else None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _check_utf8(stream: IO[bytes], filename: str) -> None:
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        piece = stream.read(2**20)
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            place = offset + error.start
            raise BadFile(f"{filename}: not UTF-8 at about byte {place}; save it with the encoding UTF-8") from error
        if not piece:
            break
        offset += len(piece)
    stream.seek(0)
    if stream.read(3) != codecs.BOM_UTF8:
        stream.seek(0)


def _csv(stream: IO[bytes], filename: str) -> Table:
    import pyarrow
    from pyarrow import csv

    start = stream.tell()
    header = stream.readline().decode()
    stream.seek(start)
    if not header.strip():
        raise BadFile(f"{filename}: empty; the first line of a CSV file names its columns")
    delimiter = max(",;\t", key=header.count)
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        with csv.open_csv(stream, parse_options=parse) as reader:
            names = reader.schema.names
        stream.seek(start)
        # As text, so that a label "007" stays one; numbers are made where numbers are wanted.
        # And only nothing is missing: "NA" and "None" may be labels.
        types = dict.fromkeys(names, pyarrow.string())
        convert = csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
        table = csv.read_csv(stream, parse_options=parse, convert_options=convert)
    except pyarrow.ArrowInvalid as error:
        raise BadFile(f"{filename}: {error}") from error
    _distinct(names, filename)
    return Table({name: table[name].to_pylist() for name in names}, "csv", "row", 2)


def _jsonl(stream: IO[bytes], filename: str) -> Table:
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    decoder = msgspec.json.Decoder(dict[str, Any])
    number = 0
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            raise BadFile(f"{filename}: line {number} is empty; every line is one JSON object")
        try:
            rows.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise BadFile(f"{filename}: line {number}: {error}; every line is one JSON object") from error
        names.update(dict.fromkeys(rows[-1]))
    if number == 0:
        raise BadFile(f"{filename}: empty")
    return Table({name: [row.get(name) for row in rows] for name in names}, "jsonl", "line", 1)


def _parquet(stream: IO[bytes], filename: str) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(stream)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise BadFile(f"{filename}: not a Parquet file that can be read: {error}") from error
    _distinct(table.column_names, filename)
    return Table({name: table[name].to_pylist() for name in table.column_names}, "parquet", "row", 1)


def _distinct(names: list[str], filename: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadFile(f"{filename}: two columns are called {twice[0]!r}")
