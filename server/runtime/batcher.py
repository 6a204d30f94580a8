"""Dynamic batching: what arrives while the batches run is the next batch.

The queue holds blocks: the rows of one request together, an array or a list. Nothing waits while the session has a run
free, and what waits is shared out evenly among the free ones. Blocks of several requests run together and a large one
is cut; rows are never touched one by one: the blocks of a batch are put together once, by whoever runs it, and the
answer of a request is a slice of what the batch answers. A request that is past its deadline or whose client has gone
is dropped before it costs a run. Where a full batch takes less than a hop to another thread and back, it runs on the
event loop itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np

from server.histograms import Distribution
from server.runtime.answers import Rows

# A batch is filled with rows of other lengths while less than this share of it is padding.
MOST_PADDING = 0.25
# A client is not suspected of having gone sooner.
UNASKED_SECONDS = 0.002
# Priorities: 0 is normal, higher goes first. A level is a head start of so many seconds, so that nobody starves: a
# request is overtaken by those of the next level that come no later than that.
PRIORITIES = range(-3, 4)
HEAD_START_SECONDS = 1.0
# How many waiting rows are looked at for rows of alike length, in batches.
LOOK_AHEAD = 8

# What a request brings: an array [rows, …] of what the graph takes, perhaps a read-only view, or a list of rows.
Block = np.ndarray | list[Any]
# What it wants: an answer of the model by its name, or outputs of the graph by theirs.
Wanted = str | tuple[str, ...]
# One value a row of an answer; of outputs one array [rows, …] each.
Value = Rows | list[np.ndarray]
# The blocks of one batch, and what is wanted of it → all of that, for all rows of the batch in their order.
Run = Callable[[list[Block], set[Wanted]], dict[Wanted, Value]]


class QueueFull(Exception):
    """As many rows wait as may; come back in `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue of this model is full")
        self.retry_after = retry_after


class DeadlinePassed(Exception):
    """The request waited until its deadline and was not run."""


class ClientGone(Exception):
    """The client has disconnected: nobody waits for the answer."""


class RunFailed(Exception):
    """The session could not run the batch."""


class Ticket:
    """One request in the queue, and what became of it.

    `future` gives, for an answer, one value a row in the order of the rows, for outputs a list of arrays [rows, …]; it
    raises DeadlinePassed, ClientGone or RunFailed, and cancelling it takes the request out of the queue. `queued`,
    `started`, `finished`: on time.perf_counter's clock, 0 as long as it is not so. `inference`: seconds of its runs;
    `batch_rows`: rows of the last of them, its own and others'.
    """

    __slots__ = (
        "batch_rows",
        "block",
        "deadline",
        "finished",
        "future",
        "gone",
        "inference",
        "lane",
        "open",
        "parts",
        "places",
        "queued",
        "rows",
        "started",
        "taken",
        "turn",
        "wanted",
    )

    def __init__(
        self,
        future: asyncio.Future[Any],
        block: Block,
        wanted: Wanted,
        deadline: float,
        gone: Callable[[], bool] | None,
        priority: int,
        lane: deque[Ticket],
    ) -> None:
        self.future = future
        self.block = block
        self.wanted = wanted
        self.deadline = deadline
        self.gone = gone
        self.rows = self.open = len(block)  # open: rows without an answer
        self.taken = 0  # rows that are no longer in the queue
        self.places: list[int] | None = None  # of the rows still in it, where they do not leave in order
        self.parts: list[tuple[Sequence[int], Any]] | None = None  # answers of a block that was cut
        self.lane = lane
        self.queued = time.perf_counter()
        self.turn = self.queued - priority * HEAD_START_SECONDS
        self.started = self.finished = self.inference = 0.0
        self.batch_rows = 0


# A block or a part of one in a batch: whose it is, which of its rows (None: all), and the rows.
Part = tuple[Ticket, Sequence[int] | None, Block]


class Batcher:
    """The queue in front of one session. Lives on the event loop it was made on."""

    def __init__(
        self,
        run: Run,
        *,
        max_batch_size: int,
        max_queue_delay: float,
        queue_limit: int,
        parallel: int,
        length: Callable[[Any], int] | None,
        batches: Distribution,
        queue_seconds: Distribution,
        inference_seconds: Distribution,
    ) -> None:
        """max_queue_delay: seconds an incomplete batch waits for more. queue_limit: rows that may wait. parallel:
        batches that run at the same time; 0 runs them on the event loop. length: of a row, where blocks are lists of
        rows that are padded to the longest of a batch; None: blocks are arrays."""
        self.run = run
        self.max_batch_size = max_batch_size
        self.max_queue_delay = max_queue_delay
        self.queue_limit = queue_limit
        self.length = length
        self.batches, self.queue_seconds, self.inference_seconds = batches, queue_seconds, inference_seconds
        self.loop = asyncio.get_running_loop()
        # What waits, by priority: within one lane first come, first served.
        self.normal: deque[Ticket] = deque()
        self.lanes = {0: self.normal}
        self.waiting_rows = 0
        self.running = 0
        self.parallel = parallel
        self.scheduled = False
        self.timer: asyncio.TimerHandle | None = None
        self.run_seconds = 0.01  # of late, smoothed
        self.executor = ThreadPoolExecutor(parallel, thread_name_prefix="session") if parallel else None

    def submit(
        self,
        block: Block,
        wanted: Wanted,
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        priority: int = 0,
    ) -> Ticket:
        """Queue the rows of a request, at least one. deadline: on time.perf_counter's clock. gone: whether nobody waits
        for the answer any more; asked before a request that has waited is run. priority: in PRIORITIES. Raises
        QueueFull."""
        lane = self.normal if priority == 0 else self.lanes.setdefault(priority, deque())
        ticket = Ticket(self.loop.create_future(), block, wanted, deadline, gone, priority, lane)
        if self.waiting_rows + ticket.rows > self.queue_limit:
            runs = self.waiting_rows / self.max_batch_size / max(1, self.parallel)
            raise QueueFull(max(1, round(runs * self.run_seconds)))
        lane.append(ticket)
        self.waiting_rows += ticket.rows
        if not self.scheduled and (not self.running or self.running != self.parallel):
            self._schedule()
        return ticket

    def depth(self) -> int:
        """Rows that wait."""
        return sum(ticket.rows - ticket.taken for ticket in chain(*self.lanes.values()) if not ticket.future.done())

    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.waiting_rows and not self.running

    def _schedule(self) -> None:
        """See to it that the waiting rows are run, as there is a run free."""
        if self.max_queue_delay and self.waiting_rows < self.max_batch_size:
            if self.timer is None:
                self.timer = self.loop.call_later(self.max_queue_delay, self._start)
            return
        # At the end of this turn of the loop: with it go the requests that the same poll brought.
        self.scheduled = True
        self.loop.call_soon(self._start)

    def _start(self) -> None:
        self.scheduled = False
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.executor is None:
            if batch := self._next_batch(self.max_batch_size):
                self._finish(batch, *self._work(batch, self._begin(batch)))
            return
        while self.waiting_rows and (free := self.parallel - self.running):
            batch = self._next_batch(min(self.max_batch_size, -(-self.waiting_rows // free)))
            if batch:
                self.running += 1
                self.executor.submit(self._work_elsewhere, batch, self._begin(batch))

    def _begin(self, batch: list[Part]) -> set[Wanted]:
        """Note that the batch starts; what is wanted of it."""
        now = time.perf_counter()
        observe = self.queue_seconds.observe
        rows, wanted = 0, set()
        for ticket, _, block in batch:
            rows += len(block)
            wanted.add(ticket.wanted)
            if ticket.started == 0.0:
                ticket.started = now
                observe(now - ticket.queued)
        for ticket, _, _ in batch:
            ticket.batch_rows = rows
        self.batches.observe(rows)
        return wanted

    def _work(
        self, batch: list[Part], wanted: set[Wanted]
    ) -> tuple[dict[Wanted, Value] | None, Exception | None, float]:
        start = time.perf_counter()
        try:
            return self.run([block for _, _, block in batch], wanted), None, time.perf_counter() - start
        except Exception as error:  # whatever it is, this batch has failed and the next may not
            return None, error, time.perf_counter() - start

    def _work_elsewhere(self, batch: list[Part], wanted: set[Wanted]) -> None:
        done = self._work(batch, wanted)
        self.loop.call_soon_threadsafe(self._finish_elsewhere, batch, *done)

    def _finish_elsewhere(
        self, batch: list[Part], found: dict[Wanted, Value] | None, error: Exception | None, seconds: float
    ) -> None:
        self.running -= 1
        self._finish(batch, found, error, seconds)

    def _finish(
        self, batch: list[Part], found: dict[Wanted, Value] | None, error: Exception | None, seconds: float
    ) -> None:
        self.inference_seconds.observe(seconds)
        self.run_seconds += 0.2 * (seconds - self.run_seconds)
        if self.waiting_rows:
            if self.executor is None:
                if not self.scheduled:
                    self._schedule()  # the loop turns once, and may bring more
            else:
                self._start()  # a run is free: the next batch comes before the answers of this one
        now = time.perf_counter()
        first = 0
        for ticket, places, block in batch:
            last = first + len(block)
            ticket.inference += seconds
            ticket.finished = now
            if ticket.future.done():
                pass  # cancelled, or failed with another part
            elif found is None:
                failure = RunFailed(str(error))
                failure.__cause__ = error
                ticket.future.set_exception(failure)
            else:
                value = found[ticket.wanted]
                if len(batch) > 1:
                    if isinstance(ticket.wanted, str):
                        value = value[first:last]
                    else:
                        value = [output[first:last] for output in value]
                if places is None:
                    ticket.future.set_result(value)
                else:
                    self._add_part(ticket, places, value)
            first = last

    def _add_part(self, ticket: Ticket, places: Sequence[int], value: Value) -> None:
        if ticket.parts is None:
            ticket.parts = []
        ticket.parts.append((places, value))
        ticket.open -= len(places)
        if ticket.open == 0:
            ticket.future.set_result(joined(ticket.parts, isinstance(ticket.wanted, str)))

    def _next_batch(self, size: int) -> list[Part]:
        """The request whose turn it is and up to `size` rows in all, taken off the queue."""
        now = time.perf_counter()
        if self.length is not None:
            return self._alike_batch(size, self.length, now)
        batch: list[Part] = []
        while size and (ticket := self._next(now)) is not None:
            rows = ticket.rows
            if not ticket.taken and rows <= size:
                ticket.lane.popleft()
                batch.append((ticket, None, ticket.block))
            else:
                first = ticket.taken
                ticket.taken = last = min(first + size, rows)
                rows = last - first
                if last == ticket.rows:
                    ticket.lane.popleft()
                batch.append((ticket, range(first, last), ticket.block[first:last]))
            size -= rows
            self.waiting_rows -= rows
        return batch

    def _next(self, now: float) -> Ticket | None:
        """Whose turn it is: the head of its lane. Requests before it that need no run are dropped."""
        while self.waiting_rows:
            if len(self.lanes) == 1:
                ticket = self.normal[0]
            else:
                ticket = min((lane[0] for lane in self.lanes.values() if lane), key=lambda head: head.turn)
            if not ticket.future.done() and (ticket.started or not self._dropped(ticket, now)):
                return ticket
            ticket.lane.popleft()
            self.waiting_rows -= ticket.rows - ticket.taken
        return None

    def _dropped(self, ticket: Ticket, now: float) -> bool:
        """Whether a request that has not begun needs no run; it is told so."""
        if now > ticket.deadline:
            ticket.future.set_exception(DeadlinePassed())
        elif ticket.gone is not None and now - ticket.queued >= UNASKED_SECONDS and ticket.gone():
            ticket.future.set_exception(ClientGone())
        else:
            return False
        return True

    def _alike_batch(self, size: int, length: Callable[[Any], int], now: float) -> list[Part]:
        """As `_next_batch`, of rows that are about as long as the oldest."""
        seen: list[tuple[Ticket, int]] = []  # rows, oldest first
        asked: list[Ticket] = []  # their tickets
        while len(seen) < LOOK_AHEAD * self.max_batch_size and (ticket := self._next(now)) is not None:
            ticket.lane.popleft()
            if ticket.places is None:
                ticket.places = list(range(ticket.rows))
            asked.append(ticket)
            self.waiting_rows -= len(ticket.places)
            seen += [(ticket, place) for place in ticket.places]
        if not seen:
            return []
        chosen: dict[Ticket, list[int]] = {}
        for i in alike([length(ticket.block[place]) for ticket, place in seen], size):
            ticket, place = seen[i]
            chosen.setdefault(ticket, []).append(place)
        batch: list[Part] = []
        for ticket, places in chosen.items():
            ticket.taken += len(places)
            if len(places) == ticket.rows:
                batch.append((ticket, None, ticket.block))
                continue
            taken = set(places)
            ticket.places = [place for place in ticket.places or () if place not in taken]
            batch.append((ticket, places, [ticket.block[place] for place in places]))
        for ticket in reversed(asked):
            if left := ticket.rows - ticket.taken:
                ticket.lane.appendleft(ticket)
                self.waiting_rows += left
        return batch


def joined(parts: list[tuple[Sequence[int], Any]], answer: bool) -> Value:
    """What several batches have answered to the rows of one block, in the order of the rows."""
    order = list(chain.from_iterable(places for places, _ in parts))
    if answer:
        rows: Rows = in_order(order, [value for _, value in parts])
        return rows
    return [in_order(order, list(values)) for values in zip(*(value for _, value in parts), strict=True)]


def in_order(order: list[int], values: list[Any]) -> Any:
    """values: of several batches, their rows one after the other; order: where each belongs."""
    if all(isinstance(value, np.ndarray) for value in values):
        return np.concatenate(values)[np.argsort(order)]
    found: list[Any] = [None] * len(order)
    for place, value in zip(order, chain.from_iterable(values), strict=True):
        found[place] = value
    return found


def alike(lengths: Sequence[int], most: int) -> list[int]:
    """Numbers of up to `most` rows to run together: row 0, the oldest, and those nearest to it in length, for as long
    as no more than a quarter of the padded batch is padding (MOST_PADDING)."""
    by_distance = sorted(range(1, len(lengths)), key=lambda i: abs(lengths[i] - lengths[0]))
    chosen, longest, total = [0], lengths[0], lengths[0]
    for i in by_distance:
        if len(chosen) == most:
            break
        new_longest = max(longest, lengths[i])
        padded = new_longest * (len(chosen) + 1)
        if padded - total - lengths[i] > MOST_PADDING * padded:
            continue
        chosen.append(i)
        longest, total = new_longest, total + lengths[i]
    return chosen
