"""Dynamic batching: what arrives while the batches run is the next batch.

The queue holds blocks: the rows of one request together, an array or a list. Nothing waits while the session has a run
free, and what waits is shared out evenly among the free ones. Blocks of several requests run together and a large one
is cut; rows are never touched one by one: the blocks of a batch are put together once, by whoever runs it, and the
answer of a request is a slice of what the batch answers. Where a full batch takes less than a hop to another thread and
back, it runs on the event loop itself.

Under more load than the session can take, what cannot be answered in time is refused at once, so that it costs nothing
and its client can go elsewhere: a request whose turn would come too late for its deadline, by what is ahead of it and
the throughput of late, and one for which the queue has no room in rows or bytes. A request that is past its deadline
all the same, or whose client has gone, is dropped before it costs a run.
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
from server.runtime.run_times import RunTimes
from server.runtime.runs import Runs
from server.runtime.throughput import Throughput

# A batch is filled with rows of other lengths while less than this share of it is padding. A processor gains little by
# larger batches, a GPU much.
MOST_PADDING = 0.25
CPU_PADDING = 0.1
# A client is not suspected of having gone sooner.
UNASKED_SECONDS = 0.002
# Priorities: 0 is normal, higher goes first. A level is a head start of so many seconds, so that nobody starves: a
# request is overtaken by those of the next level that come no later than that.
PRIORITIES = range(-3, 4)
HEAD_START_SECONDS = 1.0
# Of the time that is left to its deadline, how much of it a request may be expected to wait and run: throughput varies.
MOST_OF_THE_TIME = 0.8
# And how much of all its time its run may take: batches are no larger.
RUN_SHARE = 0.25
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
    """There is no room for the request, or it could not be answered in time; come back in `retry_after` seconds. The
    message goes on from the name of the model."""

    def __init__(self, retry_after: int, words: str = "has no room in its queue") -> None:
        super().__init__(words)
        self.retry_after = retry_after


class Overloaded(QueueFull):
    """What is ahead of the request takes longer than its deadline leaves."""

    def __init__(self, retry_after: int, wait: float) -> None:
        super().__init__(retry_after, f"would answer in about {wait:.2g} s, later than the request may wait")


class DeadlinePassed(Exception):
    """The request waited until its deadline and was not run."""


class ClientGone(Exception):
    """The client has disconnected: nobody waits for the answer."""


class RunFailed(Exception):
    """The session could not run the batch."""


class Ticket:
    """One request in the queue, and what became of it.

    `future` gives, for an answer, one value a row in the order of the rows, for outputs a list of arrays [rows, …]. It
    raises DeadlinePassed, ClientGone, RunFailed, or QueueFull where one of higher priority took its room; cancelling it
    takes the request out of the queue. `queued`, `started`, `finished`: on time.perf_counter's clock, 0 as long as it
    is not so. `inference`: seconds of its runs; `batch_rows`: rows of the last of them, its own and others'.
    `cached`: it had no run of its own.
    """

    __slots__ = (
        "batch_rows",
        "block",
        "bytes",
        "cached",
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
        lane: Lane,
        size: int,
    ) -> None:
        self.future = future
        self.block = block
        self.wanted = wanted
        self.deadline = deadline
        self.gone = gone
        self.rows = self.open = len(block)  # open: rows without an answer
        self.bytes = size
        self.taken = 0  # rows that are no longer in the queue
        self.places: list[int] | None = None  # of the rows still in it, where they do not leave in order
        self.parts: list[tuple[Sequence[int], Any]] | None = None  # answers of a block that was cut
        self.lane = lane
        self.queued = time.perf_counter()
        self.turn = self.queued - priority * HEAD_START_SECONDS
        self.started = self.finished = self.inference = 0.0
        self.batch_rows = 0
        self.cached = False


class Lane(deque[Ticket]):
    """What waits with one priority, first come, first served. rows: that wait."""

    def __init__(self, priority: int) -> None:
        super().__init__()
        self.priority = priority
        self.rows = 0


# A block or a part of one in a batch: whose it is, which of its rows (None: all), and the rows.
Part = tuple[Ticket, Sequence[int] | None, Block]


class Batcher:
    """The queue in front of one session. Lives on the event loop it was made on."""

    def __init__(
        self,
        run: Run,
        *,
        run_alone: Run | None = None,
        max_batch_size: int,
        max_queue_delay: float,
        queue_limit: int,
        queue_bytes: int,
        parallel: int,
        length: Callable[[Any], int] | None,
        padding: float = MOST_PADDING,
        most_padded: int | None = None,
        batches: Distribution,
        queue_seconds: Distribution,
        inference_seconds: Distribution,
        runs: Runs,
        refused: Callable[[str], None],
        preferred: Sequence[int] = (),
    ) -> None:
        """run_alone: for a batch beside which nothing runs or waits; None: `run`. max_queue_delay: seconds an
        incomplete batch waits for more. queue_limit, queue_bytes: of the rows that may wait. parallel: batches that run
        at the same time; 0 runs them on the event loop. length: of a row, where blocks are lists of rows that are
        padded to the longest of a batch; None: blocks are arrays. padding: the most of it, as a share of the batch;
        most_padded: places of a padded batch of several rows. refused: told why one is not run, "queue_full",
        "overload", "deadline" or "gone". preferred: sizes of batches; one is cut to the largest of them that it
        fills."""
        self.run, self.run_alone = run, run_alone
        self.max_batch_size = max_batch_size
        self.max_queue_delay = max_queue_delay
        self.queue_limit, self.queue_bytes = queue_limit, queue_bytes
        self.preferred = sorted(size for size in set(preferred) if size <= max_batch_size)
        # Rows that nobody waits to be joined by others.
        self.enough = self.preferred[0] if self.preferred else max_batch_size
        self.refused = refused
        self.length, self.padding, self.most_padded = length, padding, most_padded
        self.batches, self.queue_seconds, self.inference_seconds = batches, queue_seconds, inference_seconds
        self.runs = runs
        self.loop = asyncio.get_running_loop()
        self.normal = Lane(0)
        self.lanes = {0: self.normal}
        self.waiting_rows = self.waiting_bytes = 0
        self.running = 0
        self.crowded = False  # there was something beside the last batch when it began
        self.parallel = parallel
        self.scheduled = False
        self.timer: asyncio.TimerHandle | None = None
        self.run_times = RunTimes()
        self.run_seconds = 0.0  # of late, smoothed
        self.largest = max_batch_size  # that a batch may be, of late
        self.ample = 0.0  # who has so many seconds left is in time behind the fullest queue
        self.ends: dict[int, float] = {}  # when the runs are expected to, by the identity of their batches
        self.throughput = Throughput()  # in rows, while more of them wait
        self.answered = Throughput()  # in requests, whatever there is to do
        self.finished = time.perf_counter()  # the last run, or when it had something to do again
        self.backlog_since: float | None = None  # that every run is taken and more waits
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
        QueueFull, Overloaded."""
        lane = self.normal if priority == 0 else self.lanes.get(priority) or self._new_lane(priority)
        size = block.nbytes if isinstance(block, np.ndarray) else bytes_of(block, self.length or len)
        ticket = Ticket(self.loop.create_future(), block, wanted, deadline, gone, priority, lane, size)
        if ticket.queued > deadline:
            self._drop(ticket, "deadline", DeadlinePassed())
            return ticket
        left = deadline - ticket.queued
        if left < self.ample:
            self.admit(left, priority)
        if (self.waiting_rows or ticket.rows > self.queue_limit) and not self._room(ticket):
            self.refused("queue_full")
            raise QueueFull(seconds_to_wait(self.expected_wait(priority)))
        lane.append(ticket)
        lane.rows += ticket.rows
        self.waiting_rows += ticket.rows
        self.waiting_bytes += ticket.bytes
        if not self.scheduled and (not self.running or self.running != self.parallel):
            self._schedule()
        return ticket

    def admit(self, left: float, priority: int) -> None:
        """Whether a request that came now, with so many seconds left, could be answered in time. Raises Overloaded."""
        if not self.waiting_rows and self.running != self.parallel:
            return
        wait = self.expected_wait(priority)
        run = max(self.run_seconds, self.run_times.expected(min(self.waiting_rows + 1, self.largest)))
        if wait > 0.0 and wait + run > MOST_OF_THE_TIME * left:
            self.refused("overload")
            raise Overloaded(seconds_to_wait(wait), wait)

    def expected_wait(self, priority: int) -> float:
        """Seconds until a request that came now would be run; 0 as long as one cannot tell."""
        ahead, free = self.waiting_rows, 0.0
        if self.ends and self.running == self.parallel:
            free = abs(min(self.ends.values()) - time.perf_counter())  # what is overdue may take as long again
        if len(self.lanes) > 1:
            ahead = sum(lane.rows for lane in self.lanes.values() if lane.priority >= priority)
        return free + self._seconds_of(ahead) if ahead else free

    def _seconds_of(self, rows: int) -> float:
        """That so many rows take which wait. The throughput may be from long ago and from worse times, so it is no
        longer than they would take one batch after the other."""
        size = min(rows, self.max_batch_size)
        one_by_one = self.run_times.expected(size) * rows / size
        if not self.throughput.seconds:
            return one_by_one / max(1, self.parallel)
        since = 0.0 if self.backlog_since is None else time.perf_counter() - self.backlog_since
        return min(rows / self.throughput.rate(since), one_by_one)

    def _new_lane(self, priority: int) -> Lane:
        assert priority in PRIORITIES, "whoever reads the request has seen to that"
        return self.lanes.setdefault(priority, Lane(priority))

    def _room(self, ticket: Ticket) -> bool:
        """Whether a request fits in the queue; the newest of the lowest priorities make room for it, where they have a
        lower one."""
        if self._fits(ticket):
            return True
        for lane in sorted(self.lanes.values(), key=lambda lane: lane.priority):
            if lane.priority >= ticket.lane.priority:
                return False
            while lane and not lane[-1].started:
                last = lane.pop()
                self._count_out(last)
                if not last.future.done():
                    self._drop(last, "queue_full", QueueFull(seconds_to_wait(self.expected_wait(lane.priority))))
                if self._fits(ticket):
                    return True
        return False

    def _fits(self, ticket: Ticket) -> bool:
        return (
            self.waiting_rows + ticket.rows <= self.queue_limit
            and self.waiting_bytes + ticket.bytes <= self.queue_bytes
        )

    def _count_out(self, ticket: Ticket) -> None:
        """A ticket has left the queue with whatever of it was still there."""
        left = ticket.rows - ticket.taken
        self.waiting_rows -= left
        ticket.lane.rows -= left
        self.waiting_bytes -= ticket.bytes

    def depth(self) -> int:
        """Rows that wait."""
        return sum(
            ticket.rows - ticket.taken
            for ticket in chain.from_iterable(self.lanes.values())
            if not ticket.future.done()
        )

    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.waiting_rows and not self.running

    def _schedule(self) -> None:
        """See to it that the waiting rows are run, as there is a run free."""
        if self.max_queue_delay and self.waiting_rows < self.enough:
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
            if batch := self._next_batch(1):
                self._finish(batch, *work(self.run, batch, self._begin(batch)))
            return
        while self.waiting_rows and (free := self.parallel - self.running):
            if batch := self._next_batch(free):
                run = self._run_of_next()
                self.running += 1
                rows = sum(len(block) for _, _, block in batch)
                self.ends[id(batch)] = time.perf_counter() + self.run_times.expected(rows)
                self.executor.submit(self._work_elsewhere, run, batch, self._begin(batch))

    def _run_of_next(self) -> Run:
        """What the batch that begins is run by: `run_alone` where it has nothing beside it and will not have soon, as
        the one before had nothing either."""
        before, self.crowded = self.crowded, bool(self.running or self.waiting_rows)
        return self.run if self.run_alone is None or self.crowded or before else self.run_alone

    def _size(self, free: int, first: Ticket) -> int:
        """Rows of the next batch, where so many can run now; first: whose turn it is."""
        most = self.run_times.largest(RUN_SHARE * (first.deadline - first.queued), self.max_batch_size)
        self.largest = most
        for size in reversed(self.preferred):
            if size <= min(most, self.waiting_rows):
                return size
        return min(most, -(-self.waiting_rows // free))

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

    def _work_elsewhere(self, run: Run, batch: list[Part], wanted: set[Wanted]) -> None:
        done = work(run, batch, wanted)
        self.loop.call_soon_threadsafe(self._finish_elsewhere, batch, *done, run is self.run_alone)

    def _finish_elsewhere(
        self, batch: list[Part], found: dict[Wanted, Value] | None, error: Exception | None, seconds: float, alone: bool
    ) -> None:
        self.running -= 1
        del self.ends[id(batch)]
        self._finish(batch, found, error, seconds, alone)

    def _finish(
        self,
        batch: list[Part],
        found: dict[Wanted, Value] | None,
        error: Exception | None,
        seconds: float,
        alone: bool = False,
    ) -> None:
        self.inference_seconds.observe(seconds)
        rows = sum(len(block) for _, _, block in batch)
        if not alone:  # what is to be expected is how it will be under load
            self.run_times.add(rows, seconds)
            self.run_seconds += (0.2 if self.run_seconds else 1.0) * (seconds - self.run_seconds)
        now = time.perf_counter()
        self.answered.add(len(batch), now - self.finished)
        self.finished = now
        if self.backlog_since is not None:
            self.throughput.add(rows, now - self.backlog_since)
        longest = max(self.run_seconds, self.run_times.expected(self.max_batch_size))
        self.ample = (self._seconds_of(self.queue_limit) + 2.0 * longest) / MOST_OF_THE_TIME
        if self.waiting_rows:
            if self.executor is None:
                if not self.scheduled:
                    self._schedule()  # the loop turns once, and may bring more
            else:
                self._start()  # a run is free: the next batch comes before the answers of this one
        self.backlog_since = now if self.waiting_rows else None
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
        if found is not None:
            self.runs.add(len(batch), first, seconds)

    def _add_part(self, ticket: Ticket, places: Sequence[int], value: Value) -> None:
        if ticket.parts is None:
            ticket.parts = []
        ticket.parts.append((places, value))
        ticket.open -= len(places)
        if ticket.open == 0:
            ticket.future.set_result(joined(ticket.parts, isinstance(ticket.wanted, str)))

    def _next_batch(self, free: int) -> list[Part]:
        """The request whose turn it is and others, taken off the queue, where so many batches can run now."""
        now = time.perf_counter()
        turn = self._next(now)
        if turn is None:
            return []
        size = self._size(free, turn)
        if self.length is not None:
            return self._alike_batch(size, self.length, now)
        batch: list[Part] = []
        while size and (ticket := self._next(now)) is not None:
            first = ticket.taken
            ticket.taken = last = min(first + size, ticket.rows)
            rows = last - first
            if rows == ticket.rows:
                batch.append((ticket, None, ticket.block))
            else:
                batch.append((ticket, range(first, last), ticket.block[first:last]))
            if last == ticket.rows:
                ticket.lane.popleft()
                self.waiting_bytes -= ticket.bytes
            size -= rows
            self.waiting_rows -= rows
            ticket.lane.rows -= rows
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
            self._count_out(ticket)
        return None

    def _dropped(self, ticket: Ticket, now: float) -> bool:
        """Whether a request that has not begun needs no run; it is told so."""
        if now > ticket.deadline:
            self._drop(ticket, "deadline", DeadlinePassed())
        elif ticket.gone is not None and now - ticket.queued >= UNASKED_SECONDS and ticket.gone():
            self._drop(ticket, "gone", ClientGone())
        else:
            return False
        return True

    def _drop(self, ticket: Ticket, reason: str, error: Exception) -> None:
        self.refused(reason)
        ticket.future.set_exception(error)

    def _alike_batch(self, size: int, length: Callable[[Any], int], now: float) -> list[Part]:
        """As `_next_batch`, of rows that are about as long as the oldest."""
        seen: list[tuple[Ticket, int]] = []  # rows, oldest first
        asked: list[Ticket] = []  # their tickets
        while len(seen) < LOOK_AHEAD * self.max_batch_size and (ticket := self._next(now)) is not None:
            ticket.lane.popleft()
            if ticket.places is None:
                ticket.places = list(range(ticket.rows))
            asked.append(ticket)
            self._count_out(ticket)
            seen += [(ticket, place) for place in ticket.places]
        if not seen:
            return []
        chosen: dict[Ticket, list[int]] = {}
        for i in alike([length(ticket.block[place]) for ticket, place in seen], size, self.padding, self.most_padded):
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
                ticket.lane.rows += left
                self.waiting_rows += left
                self.waiting_bytes += ticket.bytes
        return batch


def work(
    run: Run, batch: list[Part], wanted: set[Wanted]
) -> tuple[dict[Wanted, Value] | None, Exception | None, float]:
    """What a run answers, or the error that it raises, and its seconds."""
    start = time.perf_counter()
    try:
        return run([block for _, _, block in batch], wanted), None, time.perf_counter() - start
    except Exception as error:  # whatever it is, this batch has failed and the next may not
        return None, error, time.perf_counter() - start


def seconds_to_wait(wait: float) -> int:
    """For a Retry-After."""
    return max(1, round(wait))


def bytes_of(block: list[Any], length: Callable[[Any], int]) -> int:
    """About what rows take in memory; of token ids 8 bytes each."""
    return sum(row.nbytes if isinstance(row, np.ndarray) else 8 * length(row) for row in block)


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


def alike(lengths: Sequence[int], most: int, padding: float, most_padded: int | None = None) -> list[int]:
    """Numbers of up to `most` rows to run together: row 0, the oldest, and those nearest to it in length, for as long
    as no more than this share of the padded batch is padding, and it has no more than `most_padded` places."""
    by_distance = sorted(range(1, len(lengths)), key=lambda i: abs(lengths[i] - lengths[0]))
    chosen, longest, total = [0], lengths[0], lengths[0]
    for i in by_distance:
        if len(chosen) == most:
            break
        new_longest = max(longest, lengths[i])
        padded = new_longest * (len(chosen) + 1)
        if most_padded is not None and padded > most_padded:
            continue
        if padded - total - lengths[i] > padding * padded:
            continue
        chosen.append(i)
        longest, total = new_longest, total + lengths[i]
    return chosen
