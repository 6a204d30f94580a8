"""What a front-end and the inference process say to each other.

Over the rings: calls, each the rows of one or several requests to one model, whose block lies in the slab; and their
answers, with the arrays behind the head. What does not fit goes over the control socket with memory of its own. Over
that socket, too: who serves what, what was counted, and when to stop.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import msgspec

from server.runtime.references import View

CALL = struct.Struct("<QIIIiQQQd")
COUNT = struct.Struct("<I")
ANSWER = struct.Struct("<QIIIII4xddddd")

# Instead of a set of outputs: the answer "generate" of a model whose images come from a graph of their own; all.
GENERATE = 0
ALL = 1 << 63


class Call(NamedTuple):
    """number: by which the answer is known. requests: how many they are of; the rows of each follow the head, COUNT
    each. wanted: a bit for each output of the graph in the manifest's order, GENERATE or ALL. place, size: of the block
    in the slab. deadline: on time.perf_counter's clock, which all processes of a machine share."""

    number: int
    model: int
    rows: int
    requests: int
    priority: int
    wanted: int
    place: int
    size: int
    deadline: float

    def packed(self, counts: list[int]) -> bytes:
        return CALL.pack(*self) + struct.pack(f"<{len(counts)}I", *counts)


def call_of(record: memoryview | bytes) -> tuple[Call, tuple[int, ...]]:
    """The head, and the rows of each request."""
    call = Call(*CALL.unpack_from(record))
    return call, struct.unpack_from(f"<{call.requests}I", record, CALL.size)


class Status(IntEnum):
    ANSWERED = 0
    QUEUE_FULL = 1
    OVERLOADED = 2
    DEADLINE_PASSED = 3
    CLIENT_GONE = 4
    RUN_FAILED = 5


class Answered(NamedTuple):
    """The answer to `requests` requests of a call, from the `first` on. wait: seconds that one would wait in the queue
    that came now. The other times are those of the ticket in the inference process. What follows: arrays, or what went
    wrong in UTF-8."""

    number: int
    first: int
    requests: int
    status: int
    retry_after: int
    batch_rows: int
    wait: float
    queued: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    inference: float = 0.0


def answered_of(record: memoryview | bytes) -> Answered:
    return Answered(*ANSWER.unpack_from(record))


class Settle(msgspec.Struct, tag=True):
    """The first message to a front-end. settings: JSON. host, port: to listen on. socket: of the inference process's
    own server. rates: file of what keys may still use. Descriptors: the region, the eventfd of the inference process,
    this one's."""

    settings: bytes
    host: str
    port: int
    socket: str
    rates: str


class Offer(msgspec.Struct):
    """One version of a model, as `number` from now on. manifest: JSON. folder: of its bundle. most_rows: of one call.
    most_calls: that are under way before requests are held to go together.
    freely: requests that may be open before it is asked whether they can be answered in time. cached: answers are kept
    for requests that are the same, so that each goes alone. The rest is as of the Model."""

    number: int
    manifest: bytes
    folder: str
    answers: list[str]
    raw: bool
    provider: str
    timeout: float
    queue_limit: int
    most_rows: int
    most_calls: int
    freely: int
    cached: bool


class Meaning(msgspec.Struct):
    """What the references to one name mean, and the numbers of its loaded versions."""

    view: View
    ready: dict[int, int]


class Serve(msgspec.Struct, tag=True):
    """What is served from now on, by name. new: what this front-end has not seen yet. It answers `Follows` with the
    number of this once it does so, and `Let` of those that are not among `names` any more, once its requests to them
    are done."""

    number: int
    new: list[Offer]
    names: dict[str, Meaning]


class Keys(msgspec.Struct, tag=True):
    """API keys were made or revoked: the change of this number."""

    number: int


class Stop(msgspec.Struct, tag=True):
    """Take no more connections, answer what there is, and end."""


class Report(msgspec.Struct, tag=True):
    """Say what was counted since the last time."""

    number: int


class LargeAnswer(msgspec.Struct, tag=True):
    """An answer that fits into no ring. Descriptor: what would stand in one."""


class Loaded(msgspec.Struct, tag=True):
    """What came of `Load`; error: empty, or its class and its words."""

    number: int
    error: str = ""
    message: str = ""
    retry_after: int | None = None


ToFrontend = Settle | Serve | Keys | Stop | Report | LargeAnswer | Loaded


class Ready(msgspec.Struct, tag=True):
    """It listens."""


class Follows(msgspec.Struct, tag=True):
    """What was said by `Serve` or `Keys` is what requests find."""

    number: int


class Let(msgspec.Struct, tag=True):
    """Models that this front-end asks no more."""

    numbers: list[int]


class Load(msgspec.Struct, tag=True):
    number: int
    reference: str


class LargeCall(msgspec.Struct, tag=True):
    """head: as it would stand in the ring. Descriptor: the block."""

    head: bytes


class CountedDistribution(msgspec.Struct, array_like=True):
    """Of one of a family. exemplars: bucket, labels, value, and when it was observed."""

    labels: list[str]
    counts: list[int]
    sum: float
    exemplars: list[tuple[int, dict[str, str], float, float]]


class Counted(msgspec.Struct, tag=True):
    """Since the last report, for that of `number`. counts, distributions: by the attribute of Metrics or Access that
    is the family. proxied: requests that were passed on."""

    number: int
    counts: dict[str, list[tuple[list[str], int]]]
    distributions: dict[str, list[CountedDistribution]]
    proxied: int


ToEngine = Ready | Follows | Let | Load | LargeCall | Counted
