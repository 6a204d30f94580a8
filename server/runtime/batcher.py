"""Dynamic batching: what arrives while the batches run is the next batch.

Nothing waits while the session has a run free, and what waits is shared out evenly among the free ones. Rows of several
requests run together, each request gets its own rows back, and a request that is past its deadline or whose client has
gone is dropped before it costs a run. Where a full batch takes less than a hop to another thread and back, it runs on
the event loop itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from server.histograms import Distribution
from server.runtime.answers import Rows

# A batch is filled with rows of other lengths while less than this share of it is padding.
MOST_PADDING = 0.25
# A client is not suspected of having gone sooner.
UNASKED_SECONDS = 0.002
# How many waiting rows are looked at for rows of alike length, in batches.
LOOK_AHEAD = 8

# Rows as the pre-processor made them, and the answers that somebody wants → one value a row for each.
Run = Callable[[list[Any], list[str]], dict[str, Rows]]


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
    """One request in the queue. `future` gives one value a row, in the order of the rows."""

    __slots__ = ("answer", "deadline", "future", "gone", "inference", "open", "queued", "results", "started")

    def __init__(
        self,
        future: asyncio.Future[list[Any]],
        rows: int,
        answer: str,
        deadline: float,
        gone: Callable[[], bool] | None,
    ) -> None:
        self.future = future
        self.gone = gone
        self.results: list[Any] = [None] * rows
        self.open = rows
        self.answer = answer
        self.deadline = deadline
        self.queued = time.perf_counter()
        self.started = 0.0
        self.inference = 0.0


Row = tuple[Ticket, int, Any]


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
        """max_queue_delay: seconds an incomplete batch waits for more. parallel: batches that run at the same time; 0
        runs them on the event loop. length: of a row, for grouping; None: all alike."""
        self.run = run
        self.max_batch_size = max_batch_size
        self.max_queue_delay = max_queue_delay
        self.queue_limit = queue_limit
        self.length = length
        self.batches, self.queue_seconds, self.inference_seconds = batches, queue_seconds, inference_seconds
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[Row] = deque()
        self.running = 0
        self.parallel = parallel
        self.scheduled = False
        self.timer: asyncio.TimerHandle | None = None
        self.run_seconds = 0.01  # of late, smoothed
        self.executor = ThreadPoolExecutor(parallel, thread_name_prefix="session") if parallel else None

    def submit(
        self, rows: Sequence[Any], answer: str, deadline: float, gone: Callable[[], bool] | None = None
    ) -> Ticket:
        """Queue the rows of a request. deadline: on time.perf_counter's clock. gone: whether nobody waits for the
        answer any more; asked before a request that has waited is run. Raises QueueFull.

        The future of the ticket raises DeadlinePassed, ClientGone or RunFailed; cancelling it takes the request out of
        the queue.
        """
        if len(self.waiting) + len(rows) > self.queue_limit:
            runs = len(self.waiting) / self.max_batch_size / max(1, self.parallel)
            raise QueueFull(max(1, round(runs * self.run_seconds)))
        ticket = Ticket(self.loop.create_future(), len(rows), answer, deadline, gone)
        for i, row in enumerate(rows):
            self.waiting.append((ticket, i, row))
        self._schedule()
        return ticket

    def depth(self) -> int:
        """Rows that wait."""
        return len(self.waiting)

    def _schedule(self) -> None:
        """See to it that the waiting rows are run."""
        if self.scheduled or (self.running and self.running == self.parallel):
            return
        if self.max_queue_delay and len(self.waiting) < self.max_batch_size:
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
        while self.waiting and (free := self.parallel - self.running):
            batch = self._next_batch(min(self.max_batch_size, -(-len(self.waiting) // free)))
            if batch:
                self.running += 1
                self.executor.submit(self._work_elsewhere, batch, self._begin(batch))

    def _begin(self, batch: list[Row]) -> list[str]:
        """Note that the batch starts; the answers that are wanted of it."""
        now = time.perf_counter()
        for ticket, _, _ in batch:
            if ticket.started == 0.0:
                ticket.started = now
                self.queue_seconds.observe(now - ticket.queued)
        self.batches.observe(len(batch))
        return sorted({ticket.answer for ticket, _, _ in batch})

    def _work(self, batch: list[Row], answers: list[str]) -> tuple[dict[str, Rows] | None, Exception | None, float]:
        start = time.perf_counter()
        try:
            return self.run([row for _, _, row in batch], answers), None, time.perf_counter() - start
        except Exception as error:  # whatever it is, this batch has failed and the next may not
            return None, error, time.perf_counter() - start

    def _work_elsewhere(self, batch: list[Row], answers: list[str]) -> None:
        done = self._work(batch, answers)
        self.loop.call_soon_threadsafe(self._finish_elsewhere, batch, *done)

    def _finish_elsewhere(
        self, batch: list[Row], found: dict[str, Rows] | None, error: Exception | None, seconds: float
    ) -> None:
        self.running -= 1
        self._finish(batch, found, error, seconds)

    def _finish(self, batch: list[Row], found: dict[str, Rows] | None, error: Exception | None, seconds: float) -> None:
        self.inference_seconds.observe(seconds)
        self.run_seconds += 0.2 * (seconds - self.run_seconds)
        if self.waiting:
            if self.executor is None:
                self._schedule()  # the loop turns once, and may bring more
            else:
                self._start()  # a run is free: the next batch comes before the answers of this one
        for place, (ticket, i, _) in enumerate(batch):
            if ticket.future.done():
                continue
            if found is None:
                failure = RunFailed(str(error))
                failure.__cause__ = error
                ticket.future.set_exception(failure)
                continue
            ticket.results[i] = found[ticket.answer][place]
            ticket.open -= 1
            ticket.inference += seconds
            if ticket.open == 0:
                ticket.future.set_result(ticket.results)

    def _next_batch(self, size: int) -> list[Row]:
        """The oldest row and up to `size` in all, taken off the queue; requests that need no run are dropped."""
        now = time.perf_counter()
        batch: list[Row] = []
        most = size if self.length is None else LOOK_AHEAD * self.max_batch_size
        while self.waiting and len(batch) < most:
            row = self.waiting.popleft()
            ticket = row[0]
            if ticket.future.done():
                continue  # cancelled, or failed with another row
            if now > ticket.deadline:
                ticket.future.set_exception(DeadlinePassed())
                continue
            asked = ticket.started or now - ticket.queued < UNASKED_SECONDS or (batch and batch[-1][0] is ticket)
            if not asked and ticket.gone is not None and ticket.gone():
                ticket.future.set_exception(ClientGone())
                continue
            batch.append(row)
        if self.length is None or len(batch) <= 1:
            return batch
        chosen = alike([self.length(row) for _, _, row in batch], size)
        taken = set(chosen)
        self.waiting.extendleft(row for i, row in reversed(list(enumerate(batch))) if i not in taken)
        return [batch[i] for i in chosen]


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
