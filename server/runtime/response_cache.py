"""Answers that are kept for a while: equal inputs are run once.

One cache a version of a model. An answer is found by what is wanted and a digest of the rows; the least recently used
ones make room. Requests that are equal and open at the same time share one run: if the first is given up (its client
leaves, or it has less time than the others), the next one takes its place in the queue.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from server.runtime.batcher import Block, Lane, QueueFull, RunFailed, Ticket, Wanted

# What an entry takes beside its arrays: the key, the tuple, the objects.
OVERHEAD_BYTES = 512
NOWHERE = Lane(0)


class Submit(Protocol):
    """As Batcher.submit is."""

    def __call__(
        self, block: Block, wanted: Wanted, *, deadline: float, gone: Callable[[], bool] | None, priority: int
    ) -> Ticket: ...


class Request(NamedTuple):
    """What is needed to queue it. waits: its own ticket."""

    block: Block
    wanted: Wanted
    deadline: float
    gone: Callable[[], bool] | None
    priority: int
    submit: Submit
    waits: Ticket


class Kept(NamedTuple):
    """until: on time.perf_counter's clock."""

    value: Any
    bytes: int
    until: float


class ResponseCache:
    """Lives on the event loop. bytes: of what is kept."""

    def __init__(self, ttl_seconds: float, max_bytes: int, count: Callable[[str], None]) -> None:
        """count: told of each of the "hits" (answered without a run of their own), "misses" and "evictions"."""
        self.ttl_seconds, self.max_bytes, self.count = ttl_seconds, max_bytes, count
        self.kept: OrderedDict[bytes, Kept] = OrderedDict()
        self.bytes = 0
        # By key, who waits for the run of an equal request.
        self.open: dict[bytes, deque[Request]] = {}

    def submit(
        self,
        block: Block,
        wanted: Wanted,
        *,
        deadline: float,
        gone: Callable[[], bool] | None,
        priority: int,
        submit: Submit,
    ) -> Ticket:
        """A ticket as Batcher.submit gives it. submit: to the queue. Raises QueueFull."""
        key = key_of(block, wanted)
        found = self.kept.get(key)
        now = time.perf_counter()
        if found is not None and now < found.until:
            self.kept.move_to_end(key)
            self.count("hits")
            ticket = unqueued(block, wanted, deadline)
            ticket.started = ticket.finished = now
            ticket.future.set_result(found.value)
            return ticket
        others = self.open.get(key)
        if others is not None:
            self.count("hits")
            ticket = unqueued(block, wanted, deadline)
            others.append(Request(block, wanted, deadline, gone, priority, submit, ticket))
            return ticket
        ticket = submit(block, wanted, deadline=deadline, gone=gone, priority=priority)
        self.count("misses")
        self.open[key] = deque()
        ticket.future.add_done_callback(partial(self._ran, key, ticket))
        return ticket

    def _ran(self, key: bytes, ran: Ticket, done: asyncio.Future[Any]) -> None:
        """The run that others may wait for is over, or was given up."""
        error = None if done.cancelled() else done.exception()
        if not done.cancelled() and (error is None or isinstance(error, RunFailed)):
            if error is None:
                value = self._keep(key, done.result())
            for request in self.open.pop(key):
                ticket = request.waits
                if ticket.future.done():
                    continue
                ticket.started, ticket.finished, ticket.inference = ran.started, ran.finished, ran.inference
                ticket.batch_rows = ran.batch_rows
                if error is None:
                    ticket.future.set_result(value)
                else:
                    ticket.future.set_exception(error)
            return
        waiting = self.open[key]
        while waiting:
            request = waiting.popleft()
            ticket = request.waits
            if ticket.future.done():
                continue
            try:
                ran = request.submit(
                    request.block,
                    request.wanted,
                    deadline=request.deadline,
                    gone=request.gone,
                    priority=request.priority,
                )
            except QueueFull as full:
                ticket.future.set_exception(full)
                continue
            ticket.cached = False
            waiting.appendleft(request)  # answered with the others
            ran.future.add_done_callback(partial(self._ran_for, key, ticket, ran))
            ticket.future.add_done_callback(partial(given_up, ran))
            return
        del self.open[key]

    def _ran_for(self, key: bytes, ticket: Ticket, ran: Ticket, done: asyncio.Future[Any]) -> None:
        """As `_ran`, for the ticket of a request that has taken the place of one that was given up."""
        if not done.cancelled() and not ticket.future.done() and (error := done.exception()) is not None:
            ticket.future.set_exception(error)
        self._ran(key, ran, done)

    def _keep(self, key: bytes, value: Any) -> Any:
        """The answer, kept if there is room for it, without the rest of the batch that it was a part of."""
        whole, size = apart(value)
        size += OVERHEAD_BYTES
        self._forget(key)
        if size <= self.max_bytes:
            while self.bytes + size > self.max_bytes:
                self._forget(next(iter(self.kept)))
                self.count("evictions")
            self.kept[key] = Kept(whole, size, time.perf_counter() + self.ttl_seconds)
            self.bytes += size
        return whole

    def _forget(self, key: bytes) -> None:
        if (old := self.kept.pop(key, None)) is not None:
            self.bytes -= old.bytes


def given_up(ran: Ticket, _: asyncio.Future[Any]) -> None:
    """Nobody waits for a run any more who has not been answered."""
    ran.future.cancel()


def unqueued(block: Block, wanted: Wanted, deadline: float) -> Ticket:
    """Of a request that no session runs."""
    ticket = Ticket(asyncio.get_running_loop().create_future(), block, wanted, deadline, None, 0, NOWHERE, 0)
    ticket.cached = True
    return ticket


def key_of(block: Block, wanted: Wanted) -> bytes:
    """Equal for equal rows, wherever they lie in memory. SHA-256: processors have instructions for it, and nobody can
    make two inputs that collide."""
    digest = hashlib.sha256(repr(wanted).encode())
    for row in [block] if isinstance(block, np.ndarray) else map(tokens_or_steps, block):
        array = np.ascontiguousarray(row)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    return digest.digest()


def tokens_or_steps(row: Any) -> np.ndarray:
    """A row of a list as an array: steps of a series as they are, token ids in one type."""
    return row if isinstance(row, np.ndarray) and row.ndim > 1 else np.asarray(row, np.int32)


def apart(value: Any) -> tuple[Any, int]:
    """A copy that holds on to nothing else and cannot be written to, and its bytes. value: of arrays, and lists, tuples
    and dicts of such."""
    if isinstance(value, np.ndarray):
        array = value.copy()
        array.flags.writeable = False
        return array, array.nbytes
    if isinstance(value, dict):
        parts = {name: apart(one) for name, one in value.items()}
        return {name: part for name, (part, _) in parts.items()}, 64 * len(parts) + sum(
            size for _, size in parts.values()
        )
    if isinstance(value, list | tuple):
        found = [apart(one) for one in value]
        copied = [part for part, _ in found]
        whole = (
            copied if isinstance(value, list) else type(value)(*copied) if hasattr(value, "_fields") else tuple(copied)
        )
        return whole, 64 * len(found) + sum(size for _, size in found)
    return value, 32
