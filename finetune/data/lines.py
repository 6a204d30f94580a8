"""A JSONL file as lines that are read when they are asked for: memory holds where each begins, and no more."""

from __future__ import annotations

import codecs
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from finetune.data.problems import BadFile

MOST_LINE_BYTES = 16 * 2**20
DECODER = msgspec.json.Decoder(dict[str, Any])


@dataclass(frozen=True)
class Lines:
    """starts: int64 [lines + 1], the byte that each line begins with, and the end of the last. Threads may share it."""

    stream: IO[bytes]
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def place(self, line: int) -> str:
        return f"line {line + 1}"

    def read(self, line: int) -> dict[str, Any]:
        """The object of a line. Raises BadFile for anything else."""
        start, end = int(self.starts[line]), int(self.starts[line + 1])
        if end - start > MOST_LINE_BYTES:
            raise BadFile(f"the line has {end - start:,} bytes; at most {MOST_LINE_BYTES:,} are taken")
        return decoded(os.pread(self.stream.fileno(), end - start, start))


def decoded(line: bytes) -> dict[str, Any]:
    """Raises BadFile for what is no JSON object."""
    if not line.strip():
        raise BadFile("the line is empty; every line is one JSON object")
    try:
        return DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFile(f"{error}; every line is one JSON object") from error


def open_lines(path: Path) -> Lines:
    """The lines of a file; empty ones at its end are none."""
    starts, offset, filled = [0], 0, 0
    with path.open("rb") as stream:
        if stream.read(3) == codecs.BOM_UTF8:
            starts, offset = [3], 3
        stream.seek(offset)
        while piece := stream.readline(2**20):
            offset += len(piece)
            if piece.strip():
                filled = len(starts)
            if piece.endswith(b"\n"):
                starts.append(offset)
    if starts[-1] != offset:
        starts.append(offset)
    return Lines(path.open("rb"), np.array(starts[: filled + 1], np.int64))
