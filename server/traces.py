"""Traces of requests, sent to an OpenTelemetry collector: request → decode, queue, batch → session, encode; of language
models queue, prefill and decode of every sequence.

Nothing is done while a request runs. When it is answered, what its ticket has noted is kept, where the request is to be
traced; once a second spans are made of that, in another thread, and sent. Requests that ran in one batch are told by
the moment at which it began, and linked. Whether a request is traced its caller decides by W3C's traceparent header; of
those without one, `trace_share` are.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from server.generation_metrics import Times
from server.settings import Settings, SettingsError

if TYPE_CHECKING:
    from server.spans import Sender

log = logging.getLogger("espalier.traces")

SEND_SECONDS = 1.0
# Requests of one batch are answered about the same time: what was answered just now waits for the others.
SETTLE_SECONDS = 0.25
# Requests that wait to be sent; more are dropped, and a line says so.
MOST_WAITING = 20_000

TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Origin(NamedTuple):
    """What a request belongs to: its trace, the span that it is told by, and that of whoever sent it, 0: of nobody."""

    trace: int
    span: int
    parent: int


class Ran(NamedTuple):
    """What a ticket of a batcher noted; times on time.perf_counter's clock."""

    queued: float
    started: float
    finished: float
    inference: float
    rows: int
    batch_rows: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A request, after its answer. start, end: on time.perf_counter's clock. route: its path as the API has it; of gRPC
    (`rpc`) service/method, where `status` is gRPC's and `method` says nothing. request_id: "" where it has none."""

    origin: Origin
    method: str
    route: str
    status: int
    start: float
    end: float
    request_id: str
    key: str | None = None
    model: str | None = None
    version: int | None = None
    provider: str | None = None
    runs: Sequence[Ran] = ()
    sequences: Sequence[Times] = ()
    rpc: bool = False


class Traces:
    """Of one process. Lives on the event loop."""

    def __init__(self, share: float, sender: Sender) -> None:
        """share: of the requests that no traceparent decides about, 0 to 1."""
        self.share, self.sender = share, sender
        self.waiting: list[Answered] = []
        self.task: asyncio.Task[None] | None = None

    def origin(self, headers: Iterable[tuple[bytes, bytes]]) -> Origin | None:
        """Where a request belongs; None: it is not to be traced. headers: names in lower case."""
        for name, value in headers:
            if name == b"traceparent" and (found := TRACEPARENT.fullmatch(value)) and not value.startswith(b"ff"):
                trace, parent, flags = int(found[1], 16), int(found[2], 16), int(found[3], 16)
                if trace and parent:
                    return Origin(trace, random.getrandbits(64) or 1, parent) if flags & 1 else None
        if random.random() >= self.share:
            return None
        return Origin(random.getrandbits(128) or 1, random.getrandbits(64) or 1, 0)

    def add(self, answered: Answered) -> dict[str, str]:
        """Keep it for sending. Its exemplar."""
        if len(self.waiting) < MOST_WAITING:
            self.waiting.append(answered)
            if len(self.waiting) == MOST_WAITING:
                log.warning("%d requests wait to be sent as traces: what comes now is not traced", MOST_WAITING)
        found = {"trace_id": f"{answered.origin.trace:032x}"}
        return found | {"request_id": answered.request_id} if answered.request_id else found

    def start(self) -> None:
        self.task = asyncio.create_task(self._send_again())

    async def stop(self) -> None:
        """Send what is there."""
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task
        await self.send(settle=0.0)
        await asyncio.to_thread(self.sender.close)

    async def send(self, settle: float = SETTLE_SECONDS) -> None:
        """Send what was answered more than `settle` seconds ago."""
        until = time.perf_counter() - settle
        ready = [one for one in self.waiting if one.end <= until]
        if ready:
            self.waiting = [one for one in self.waiting if one.end > until]
            await asyncio.to_thread(self.sender.send, ready)

    async def _send_again(self) -> None:
        while True:
            await asyncio.sleep(SEND_SECONDS)
            await self.send()


def traces(settings: Settings) -> Traces | None:
    """None where nobody collects them. Raises SettingsError where the packages for it are missing."""
    if not settings.otlp_endpoint:
        return None
    try:
        from server.spans import Sender
    except ImportError as error:
        words = "otlp_endpoint: OpenTelemetry is not installed; install it with `pip install 'espalier[traces]'`"
        raise SettingsError(words) from error
    return Traces(settings.trace_share, Sender(settings.otlp_endpoint))
