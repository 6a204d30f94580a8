"""A list of numbers taken out of a JSON body, and read without a Python object for each number.

Most of a body with a vector is the vector. It is cut out where it begins to be read, simdjson makes it an array, and a
mark stands for it in the rest, which is decoded as ever: where the mark is what the rest has as its `input`, the
numbers are that input, whatever else the body may contain.
"""

from __future__ import annotations

import re
import secrets
import warnings
from functools import cache
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

from export.processing.inputs import BadInput, VectorInput
from export.processing.vectors import vectors

try:
    import simdjson
except ImportError:  # there is none for this Python: msgspec reads numbers, too, in twice the time
    parser: Any = None
else:
    parser = simdjson.Parser()

# Where a list of numbers begins that is an `input`, within so many bytes of a body.
BEGINS = re.compile(rb'"input"\s*:\s*(\[)\s*[-0-9]')
SEARCHED_BYTES = 512
# Nobody can know what stands for the numbers.
MARK = secrets.token_hex(16)
IN_JSON = b'"%b"' % MARK.encode()
# Numbers whose squares add up to less are all finite as float32.
MOST = float(np.finfo(np.float32).max) ** 2

# They are refused, and np.errstate would take as long as all that is done with the others.
warnings.filterwarnings("ignore", "overflow encountered in dot", RuntimeWarning)

numbers_decoder = msgspec.json.Decoder(list[float])

R = TypeVar("R")


def cut(body: bytes, kind: type[R]) -> tuple[R, bytes] | None:
    """A request of this kind without its `input`, and the text of that, a list of numbers it seems; None where `input`
    is something else, or anything is wrong."""
    found = BEGINS.search(body, 0, SEARCHED_BYTES)
    if found is None:
        return None
    start = found.start(1)
    end = body.find(b"]", start) + 1
    if end == 0:
        return None
    try:
        rest = marked_decoder(cast(Any, kind)).decode(b"%b%b%b" % (body[:start], IN_JSON, body[end:]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return (rest, body[start:end]) if rest.input == MARK else None


@cache
def marked_decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(msgspec.defstruct(kind.__name__, [("input", str)], bases=(kind,)))


def one_vector(text: bytes, spec: VectorInput) -> np.ndarray | None:
    """A JSON list of numbers to float32 [1, features]; None where it is none, or no vector that the model takes."""
    if parser is None:
        try:
            return vectors([numbers_decoder.decode(text)], spec)
        except (msgspec.DecodeError, BadInput):
            return None
    found = float32s(text)
    return None if found is None or len(found) != spec.features else found[None]


def float32s(text: bytes) -> np.ndarray | None:
    """The numbers of a JSON list, or of lists in it, one after the other; None where there is anything else, where one
    is not finite, or where nothing here reads them this way."""
    if parser is None:
        return None
    try:
        values = np.frombuffer(parser.parse(text).as_buffer(of_type="d"))
    except (ValueError, TypeError, RuntimeError):
        return None
    return values.astype(np.float32) if values.dot(values) < MOST else None
