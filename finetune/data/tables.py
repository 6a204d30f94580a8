"""CSV, JSONL and Parquet files as columns of Python values."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import msgspec

from finetune.data.problems import BadFile

# The longest row of a CSV file.
CSV_BLOCK_BYTES = 32 * 2**20
# A Parquet file beyond these would fill the memory: bytes from which the ratio of unpacked to packed counts.
PARQUET_RATIO_FROM_BYTES = 256 * 2**20
PARQUET_MOST_RATIO = 200
PARQUET_ROWS_AT_ONCE = 256
CELL_BYTES = 8

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
    """A cell as a label or text: None for one that is empty or missing, or holds lists, objects or bytes. A whole float
    is written without its point."""
    if value is None or isinstance(value, list | dict | bytes) or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def number_of(value: Any) -> float | None:
    """A cell as a number; None when it is none, or beyond what a float can hold."""
    if isinstance(value, bool) or value is None:
        return float(value) if isinstance(value, bool) else None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _check_utf8(stream: IO[bytes], filename: str) -> None:
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        piece = stream.read(2**20)
        waiting = len(decoder.getstate()[0])
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            place = offset - waiting + error.start
            raise BadFile(f"{filename}: not UTF-8 at byte {place}; save it with the encoding UTF-8") from error
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
    wrong: list[Any] = []

    def refuse(row: Any) -> str:
        wrong.append(row)
        return "error"

    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse)
    # Only one thread knows the number of a row.
    options = csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES)
    try:
        with csv.open_csv(stream, read_options=options, parse_options=parse) as reader:
            names = reader.schema.names
        stream.seek(start)
        # As text, so that a label "007" stays one; numbers are made where numbers are wanted.
        # And only nothing is missing: "NA" and "None" may be labels.
        types = dict.fromkeys(names, pyarrow.string())
        convert = csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
        table = csv.read_csv(stream, read_options=options, parse_options=parse, convert_options=convert)
    except pyarrow.ArrowInvalid as error:
        if wrong:
            row = wrong[0]
            raise BadFile(
                f"{filename}: row {row.number} has {row.actual_columns} values, the first row names "
                f"{row.expected_columns} columns: {row.text[:80]!r}; a value with {delimiter!r} or a line break in it "
                "needs double quotes around it"
            ) from error
        if "straddling" in str(error):
            raise BadFile(
                f"{filename}: a row longer than {CSV_BLOCK_BYTES:,} bytes, or a double quote that is never closed"
            ) from error
        raise BadFile(f"{filename}: {error}") from error
    _distinct(names, filename)
    return Table({name: table[name].to_pylist() for name in names}, "csv", "row", 2)


def _jsonl(stream: IO[bytes], filename: str) -> Table:
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    decoder = msgspec.json.Decoder(dict[str, Any])
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        if number > len(rows) + 1:  # empty lines are taken at the end only, or no item could be found by its line
            raise BadFile(f"{filename}: line {len(rows) + 1} is empty; every line is one JSON object")
        try:
            rows.append(decoder.decode(line))
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadFile(f"{filename}: line {number}: {error}; every line is one JSON object") from error
        names.update(dict.fromkeys(rows[-1]))
    if not names:
        raise BadFile(f"{filename}: empty; every line is one JSON object")
    return Table({name: [row.get(name) for row in rows] for name in names}, "jsonl", "line", 1)


def _parquet(stream: IO[bytes], filename: str) -> Table:
    import pyarrow
    from pyarrow import parquet

    size = stream.seek(0, os.SEEK_END)
    limit = max(PARQUET_RATIO_FROM_BYTES, PARQUET_MOST_RATIO * size)
    unpacked = 0
    try:
        file = parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        _distinct(names, filename)
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for batch in file.iter_batches(PARQUET_ROWS_AT_ONCE, use_threads=False):
            unpacked += batch.nbytes + CELL_BYTES * batch.num_rows * len(names)
            if unpacked > limit:
                raise BadFile(
                    f"{filename}: {size:,} bytes unpack to more than {limit:,}; refused as a compression bomb"
                )
            for name, values in zip(names, batch.columns, strict=True):
                columns[name] += values.to_pylist()
    except BadFile:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadFile(f"{filename}: not a Parquet file that can be read: {error}") from error
    return Table({**columns}, "parquet", "row", 1)


def _distinct(names: list[str], filename: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadFile(f"{filename}: two columns are called {twice[0]!r}")
