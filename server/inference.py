"""What REST and gRPC do alike with a request for inference, once it is read: which models take tensors, when it must be
answered, what its outputs become.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from server import tensors
from server.errors import ApiError
from server.runtime.batcher import PRIORITIES
from server.runtime.model import Model

# Triton's levels: 1 goes first, and 0 stands for the one in the middle.
PRIORITY_LEVELS = len(PRIORITIES)
DEFAULT_LEVEL = PRIORITY_LEVELS // 2 + 1

WRITERS = {"complete": "/v1/completions", "chat": "/v1/chat/completions"}


class Wanted(NamedTuple):
    """One output that is asked for. classes: how many of the best scores instead of the tensor. binary: how it is
    sent."""

    name: str
    classes: int | None = None
    binary: bool = False


class Result(NamedTuple):
    """One output, ready to be sent. shape: of data; of BYTES that of its elements."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: np.ndarray | list[bytes]
    binary: bool


def check_takes_tensors(model: Model) -> None:
    """Raises ApiError 400 for a model that writes texts, naming the routes that it is asked at."""
    if not model.raw:
        right = " or ".join(place for answer, place in WRITERS.items() if answer in model.answers)
        raise ApiError(400, f"{model.name} writes texts and takes no tensors; ask it at {right}", param="model")


def priority(level: int) -> int:
    """Of the queue, from Triton's `priority`. Raises ApiError 400."""
    if not 0 <= level <= PRIORITY_LEVELS:
        words = f"priority is {level}; the levels are 1 to {PRIORITY_LEVELS}, 1 goes first"
        raise ApiError(400, f"{words}, and 0 stands for {DEFAULT_LEVEL}", param="priority")
    return PRIORITIES[-level] if level else 0


def seconds(timeout: int) -> float | None:
    """From Triton's `timeout` in microseconds, 0 for none. Raises ApiError 400."""
    if timeout < 0:
        raise ApiError(400, f"timeout is {timeout}; it is a number of microseconds", param="timeout")
    return timeout / 1e6 or None


def check_rows(rows: int, limit: int) -> None:
    """Raises ApiError 400 for more than a queue ever holds."""
    if rows > limit:
        raise ApiError(400, f"{rows} rows in one request; at most {limit} are taken", param="inputs")


def check_alone(sequence: int | str) -> None:
    """Raises ApiError 400 for a request that belongs to a sequence."""
    if sequence not in (0, ""):
        raise ApiError(400, "sequence_id: no model here keeps state between requests", param="sequence_id")


def no_shared_memory() -> ApiError:
    return ApiError(400, "shared_memory_region: this server shares no memory with clients; send the data")


def results(model: Model, wanted: Sequence[Wanted], names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[Result]:
    """The outputs as they are asked for. names: of `arrays`, outputs of the graph. Raises BadInput."""
    known = model.signature
    found = dict(zip(names, arrays, strict=True))
    made = []
    for name, classes, binary in wanted:
        array, datatype = found[name], known.outputs[name].datatype
        if classes is not None:
            best = tensors.classes(name, array, classes, known.labels.get(name, []))
            made.append(Result(name, "BYTES", [len(array), len(best) // len(array)], best, binary))
            continue
        dtype = tensors.DATATYPES[datatype]
        made.append(Result(name, datatype, array.shape, array if array.dtype == dtype else array.astype(dtype), binary))
    return made
