"""Continuous batching: the engine that writes many sequences at once, each of which comes and goes when it likes.

It has a thread of its own while there is something to do. In every turn it lets in who waits, as far as there are slots
and memory, reads a piece of one prompt, and computes the next token of all sequences that are being written (Yu et al.
2022, Orca; Agrawal et al. 2024, Sarathi). Those that have begun are in rows 0, 1, …: the last one moves into the place
of one that leaves, and rows behind them keep what they held, for prompts that begin with it. A sequence that is alone
is computed some guessed tokens ahead (`guesses`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from server.generation_metrics import FinishReason, GenerationMetrics, Occupancy, Times
from server.runtime.batcher import MOST_PADDING, ClientGone, DeadlinePassed, QueueFull, RunFailed
from server.runtime.orders import Order, Stream, Ticket
from server.runtime.pace import Pace
from server.runtime.prefixes import LEAST_SHARED, HeldTokens
from server.runtime.sampling import Sampled, Sampler, sample, scores
from server.runtime.search import TOKENS_A_CHARACTER, Candidate
from server.runtime.slots import SlotModel

log = logging.getLogger("espalier.generation")

# How often clients are asked whether they are still there.
ASKED_SECONDS = 0.25
SWEPT_SECONDS = 0.02
# Tokens of a prompt whose logits, each over the whole vocabulary, are in memory together.
MOST_SCORED = 64
# The thread waits so long for another order before it ends; what holds the engine's model then is its owner alone.
LINGER_SECONDS = 1.0


@dataclass(slots=True)
class _News:
    """What a turn has brought, for the event loop."""

    heard: list[tuple[Stream, Sampled]] = field(default_factory=list)
    finished: list[tuple[Stream, Candidate]] = field(default_factory=list)
    failed: list[tuple[Ticket, Exception]] = field(default_factory=list)


class Engine:
    """Made on an event loop, and its methods are for that loop. `context`: places of a sequence, prompt and answer."""

    def __init__(
        self,
        model: SlotModel,
        *,
        ends: frozenset[int],
        text: Callable[[list[int]], str],
        queue_limit: int,
        metrics: GenerationMetrics | None = None,
    ) -> None:
        """ends: tokens that end a sequence. text: of tokens, for stop texts. queue_limit: orders that may wait."""
        self.model, self.ends, self.text, self.queue_limit, self.metrics = model, ends, text, queue_limit, metrics
        self.context = min(model.context, model.tokens)
        self.loop = asyncio.get_running_loop()
        self.open: dict[Ticket, None] = {}
        self.asked = 0.0  # when the clients were
        self.swept = 0.0  # when those that wait were looked through
        self.submitted = 0  # sequences, ever
        self.closed = False
        # Between the loop and the thread.
        self.inbox: deque[Ticket] = deque()
        self.wake = threading.Event()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        # The thread's own. running: streams that have a slot, the oldest first. streams: those that have begun, by row.
        # reading: those with a prompt to be read, the oldest first. writing: those whose prompt is read, in the order
        # of their rows; None: to be found anew.
        self.waiting: deque[Ticket] = deque()
        self.running: dict[Stream, None] = {}
        self.streams: list[Stream] = []
        self.reading: list[Stream] = []
        self.writing: tuple[list[Stream], list[Sampler], list[Times], np.ndarray] | None = None
        self.held = HeldTokens(model)
        self.places = np.zeros(model.rows, np.int64)  # that the sequence in each row may take
        self.last = np.zeros(model.slots, np.int64)  # the token each sequence goes on with
        self.lengths = np.zeros(model.slots, np.int32)
        self.pace = Pace()
        self.oldest_first = False
        self.let_in = 0  # sequences that wait no longer, ever
        self.order_seconds = 1.0  # in which a slot is free again, smoothed
        self.news, self.told = _News(), 0.0
        if metrics is not None:
            metrics.occupancy = self.occupancy

    def submit(self, order: Order) -> Ticket:
        """Queue an order. Raises QueueFull, RunFailed after `close`, and ValueError for an order that can never be
        carried out: without tokens, or with more places than there are."""
        if self.closed:
            raise RunFailed("the model is closed")
        sampling = order.sampling
        if not len(order.tokens) or sampling.max_tokens < 1 or not 1 <= sampling.n <= sampling.best_of:
            raise ValueError("an order needs a prompt, a token to write and 1 ≤ n ≤ best_of")
        if len(order.tokens) + sampling.max_tokens > self.context:
            raise ValueError(f"{len(order.tokens)} tokens and {sampling.max_tokens} more are above {self.context}")
        if self.depth() >= self.queue_limit:
            waves = (self.submitted - self.let_in) / self.model.slots
            raise QueueFull(max(1, round(waves * self.order_seconds)))
        ticket = Ticket(self.loop.create_future(), order)
        self.open[ticket] = None
        ticket.future.add_done_callback(lambda _: self.open.pop(ticket, None))
        self.submitted += len(ticket.streams)
        with self.lock:
            self.inbox.append(ticket)
            if self.thread is None:
                self.thread = threading.Thread(target=self._live, name="generation", daemon=True)
                self.thread.start()
        self.wake.set()
        return ticket

    def depth(self) -> int:
        """Orders that wait."""
        return len(self.inbox) + len(self.waiting)

    def occupancy(self) -> Occupancy:
        """What is held now; for any thread."""
        model, held = self.model, int(self.held.filled[: len(self.streams)].sum())
        places = min(model.tokens, model.slots * model.context)
        return Occupancy(len(self.running), self.submitted - self.let_in, model.slots, held, places)

    async def drain(self) -> None:
        """Wait until every order is answered and its slots are free."""
        while self.open or self.inbox or self.waiting or self.running:  # noqa: ASYNC110 - once
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Take no more orders and fail those that are open."""
        self.closed = True
        for ticket in list(self.open):
            _fail(ticket, RunFailed("the model is closed"))
        self.wake.set()

    # What follows runs on the thread, up to `_hear`.

    def _live(self) -> None:
        while True:
            self.wake.clear()
            try:
                busy = self._turn()
            except Exception as error:  # of the engine itself: nobody must wait for ever
                log.exception("the engine failed")
                self._reset(error)
                busy = True
            self._tell()
            if busy:
                continue
            if not self.closed and self.wake.wait(LINGER_SECONDS):
                continue
            with self.lock:
                if not self.inbox:
                    self.thread = None
                    return

    def _turn(self) -> bool:
        """One round; whether there is more to do."""
        while self.inbox:
            self.waiting.append(self.inbox.popleft())
        self._drop()
        self._let_in()
        if self.reading:
            self._read()
        if self._writing()[0]:
            self._step()
        return bool(self.running or self.waiting)

    def _drop(self) -> None:
        """Orders that nobody waits for, or whose time is over. Many may wait: they are looked through now and then."""
        now = time.perf_counter()
        dropped: list[Ticket] = []
        if now - self.swept > SWEPT_SECONDS:
            self.swept = now
            dropped = [ticket for ticket in self.waiting if self._is_over(ticket, now)]
            self.waiting = deque(ticket for ticket in self.waiting if not ticket.over)
        for stream in self.running:
            if stream.ticket not in dropped and self._is_over(stream.ticket, now):
                dropped.append(stream.ticket)
        for ticket in dropped:
            self._give_up(ticket, "abort")
        if dropped:
            self._leave([stream for stream in self.running if stream.ticket.over])

    def _is_over(self, ticket: Ticket, now: float) -> bool:
        order = ticket.order
        if not ticket.over and not ticket.future.done():
            last = order.deadline if not ticket.let_in else order.until
            last = last if order.until is None or last is None else min(last, order.until)
            if last is None or now <= last:
                return False
            self.news.failed.append((ticket, DeadlinePassed()))
        ticket.over = True
        return True

    def _give_up(self, ticket: Ticket, reason: FinishReason) -> None:
        """Note that the streams of an order end without an answer."""
        ticket.over, ticket.logits = True, None
        self.let_in += len(ticket.streams) - ticket.let_in
        ticket.let_in = len(ticket.streams)
        for stream in ticket.streams:
            if not stream.ended:
                stream.ended = True
                self._count(stream, reason)

    def _fail(self, streams: Sequence[Stream], error: Exception) -> None:
        """A run has failed: the orders of these streams are not answered, and what their rows hold is worth nothing."""
        log.error("a run of %d sequences failed: %s", len(streams), error)
        for ticket in {stream.ticket: None for stream in streams}:
            failure = RunFailed(str(error))
            failure.__cause__ = error
            self.news.failed.append((ticket, failure))
            self._give_up(ticket, "error")
        for stream in streams:
            self.held.forget(stream.row)
        self._leave([stream for stream in self.running if stream.ticket.over])

    def _reset(self, error: Exception) -> None:
        """Fail whatever is open, and begin anew."""
        for ticket in {**dict.fromkeys(self.waiting), **{stream.ticket: None for stream in self.running}}:
            self.news.failed.append((ticket, RunFailed(str(error))))
            self._give_up(ticket, "error")
        self.waiting.clear()
        self.running, self.streams, self.reading, self.writing = {}, [], [], None
        for row in range(self.model.rows):
            self.held.forget(row)

    # Slots.

    def _let_in(self) -> None:
        """Give slots to those who have waited longest, while there are slots and memory; nobody overtakes."""
        while self.waiting and len(self.running) < self.model.slots:
            ticket = self.waiting[0]
            if self._is_over(ticket, time.perf_counter()):
                self.waiting.popleft()
                self._give_up(ticket, "abort")
                continue
            if not self._make_room(ticket.places):
                return
            stream = ticket.streams[ticket.let_in]
            ticket.let_in += 1
            self.let_in += 1
            if ticket.let_in == len(ticket.streams):
                self.waiting.popleft()
            sampling = ticket.order.sampling
            stream.sampler = Sampler(sampling, place=stream.number, prompt=ticket.order.tokens, ends=self.ends)
            stream.times.scheduled = time.perf_counter()
            self.running[stream] = None
            # The others of an order begin with what the first one has read.
            if stream.number == 0 or not ticket.streams[0].reading:
                self.reading.append(stream)

    def _make_room(self, places: int) -> bool:
        """Whether a sequence of so many places fits into memory; rows that are not in use give theirs back for it, the
        least recently used first."""
        taken, rows = self.held.taken, len(self.streams)
        spare = self.model.tokens - places - int(np.maximum(taken[:rows], self.places[:rows]).sum())
        spare -= sum(stream.ticket.places for stream in self.running if stream.row < 0)
        if spare < 0:
            return False
        while int(taken[rows:].sum()) > spare:
            free = np.flatnonzero(taken[rows:]) + rows
            row = int(free[self.held.used[free].argmin()])
            self.held.forget(row)
            self.held.release(row, 0)
        return True

    def _settle(self, stream: Stream, source: int, front: int) -> None:
        """Let a stream into the first row that is not in use, with the first `front` tokens of row `source`."""
        held, row, places = self.held, len(self.streams), stream.ticket.places
        if held.filled[row] > (front if source == row else 0):  # others may want what would be lost
            oldest = held.oldest(row, but=source)
            if oldest != row:
                held.copy(row, oldest, int(held.filled[row]))
        if source == row or not front:
            held.filled[row] = front
        else:
            held.copy(source, row, front)
            if source > row and front == held.filled[source]:
                held.forget(source)
        held.release(row, places)
        held.touch(row)
        stream.row, self.places[row] = row, places
        self.streams.append(stream)
        self.writing = None
        if self.metrics is not None:
            self.metrics.begins(stream.times, time.perf_counter(), reused=front)

    def _front(self, ticket: Ticket, shared: int) -> int:
        """How many places of a row that holds so many of the prompt are of use. The last token is computed for its
        logits, unless these are known."""
        if ticket.order.unscored:
            return 0
        most = len(ticket.prompt) - (ticket.logits is None)
        return min(shared, most) if shared >= LEAST_SHARED or shared == len(ticket.prompt) else 0

    def _leave(self, streams: Sequence[Stream]) -> None:
        """Take sequences out; the last row moves into the place of each. Their rows keep what they held."""
        for stream in sorted(streams, key=lambda stream: -stream.row):
            del self.running[stream]
            if stream in self.reading:
                self.reading.remove(stream)
            if stream.row < 0:
                continue
            held, row, last = self.held, stream.row, len(self.streams) - 1
            held.touch(row)
            if not held.filled[row]:
                held.forget(row)
            if row != last:
                moved = self.streams[last]
                if held.filled[row] >= LEAST_SHARED:
                    held.copy(row, held.oldest(last + 1), int(held.filled[row]))
                held.copy(last, row, int(held.filled[last]))
                held.forget(last)
                self.streams[row], moved.row = moved, row
                self.last[row], self.places[row] = self.last[last], self.places[last]
                held.release(row, int(self.places[row]))
            self.streams.pop()
            stream.row = -1
        self.writing = None
        self._make_room(0)

    # Reading prompts.

    def _begin(self, stream: Stream) -> None:
        """Give a stream its row, with what rows have of its prompt."""
        shared, row = self.held.shared(stream.ticket.prompt), len(self.streams)
        source = row if shared[row] == shared.max() else int(shared.argmax())
        self._settle(stream, source, self._front(stream.ticket, int(shared[source])))

    def _left(self, stream: Stream) -> int:
        """Tokens of the prompt that are not computed yet."""
        return len(stream.ticket.prompt) - (int(self.held.filled[stream.row]) if stream.row >= 0 else 0)

    def _read(self) -> None:
        """A piece of a prompt, or several short ones at once. Turns go to the oldest and to the one that is nearest its
        end: a long prompt stops no short ones, and these never stop it."""
        self.oldest_first = not self.oldest_first
        stream = self.reading[0] if self.oldest_first else min(self.reading, key=self._left)
        limit = self.pace.chunk(writing=len(self._writing()[0]), reading=len(self.reading))
        group = [stream]
        if stream.row < 0:
            self._begin(stream)
            if not self.held.filled[stream.row] and not stream.ticket.order.unscored:
                group = self._group(stream, limit)
        logits, left = stream.ticket.logits, self._left(stream)
        if logits is not None and not left:
            self._write([stream], logits[None].copy(), 0)
            return
        found: np.ndarray | None
        start = time.perf_counter()
        try:
            if len(group) > 1:
                found = self.model.prefill_together(stream.row, [member.ticket.prompt for member in group])
                computed = len(group) * max(len(member.ticket.prompt) for member in group)
            else:
                computed, place = min(left, limit), int(self.held.filled[stream.row])
                if stream.ticket.order.unscored:
                    computed = min(computed, MOST_SCORED)
                piece = stream.ticket.prompt[place : place + computed]
                if stream.ticket.order.unscored:
                    found = self._score(stream.ticket, stream.row, piece, place)
                else:
                    last = self.model.prefill(stream.row, piece, place, logits=computed == left)
                    found = None if last is None else last[None]
        except Exception as error:  # whatever it is, these sequences have failed and others may not
            self._fail(group, error)
            return
        self.pace.read(computed, time.perf_counter() - start)
        if found is None:
            self.held.write(stream.row, piece)
            self._observe([], computed)
            return
        for member in group:
            self.held.write(member.row, member.ticket.prompt[self.held.filled[member.row] :])
        self._write(group, found, computed)

    def _score(self, ticket: Ticket, row: int, piece: np.ndarray, place: int) -> np.ndarray | None:
        """Read a piece of a prompt and measure the tokens that follow it there; logits of what follows the prompt,
        float32 [1, vocabulary], once all of it is read."""
        order = ticket.order
        assert order.scores is not None, "an order that is to be scored has them"
        logits = self.model.score(row, piece, place)
        after = ticket.prompt[place + 1 : place + 1 + len(piece)]
        last = logits[len(after) :].copy()
        order.scores.extend(scores(logits[: len(after)], after, order.sampling.alternatives or 0))
        return last if len(last) else None

    def _group(self, first: Stream, limit: int) -> list[Stream]:
        """Prompts that are read together with that of a stream that has just begun with nothing: the oldest of those
        that begin with nothing, too, alike in length and not in what they begin with."""
        prompt = first.ticket.prompt
        group, total, longest = [first], len(prompt), len(prompt)
        for stream in [stream for stream in self.reading if stream.row < 0]:
            own = stream.ticket.prompt
            if stream.ticket.order.unscored:
                continue
            padded = max(longest, len(own)) * (len(group) + 1)
            if padded > limit or padded - total - len(own) > MOST_PADDING * padded:
                continue
            if _alike(prompt, own) >= LEAST_SHARED or self.held.shared(own).max() >= LEAST_SHARED:
                continue
            self._settle(stream, len(self.streams), 0)
            group.append(stream)
            total, longest = total + len(own), max(longest, len(own))
        return group

    def _write(self, streams: Sequence[Stream], logits: np.ndarray, computed: int) -> None:
        """The prompts of these are read: their first tokens, and those of the others of their orders. logits: float32
        [streams, vocabulary]."""
        rows: list[int] = []
        begun: list[Stream] = []
        for place, stream in enumerate(streams):
            ticket = stream.ticket
            self.reading.remove(stream)
            others = [
                other
                for other in ticket.streams[: ticket.let_in]
                if other.row < 0 and not other.ended and other not in self.reading
            ]
            for other in others:
                self._settle(other, stream.row, len(ticket.prompt))
            for each in (stream, *others):
                each.reading = False
                begun.append(each)
                rows.append(place)
            if ticket.let_in == len(ticket.streams) and not any(other.reading for other in ticket.streams):
                ticket.logits = None
            elif ticket.logits is None:
                ticket.logits = logits[place].copy()
        self.writing = None
        self._grow(begun, [stream.sampler for stream in begun if stream.sampler], logits[rows], computed)

    # Writing.

    def _writing(self) -> tuple[list[Stream], list[Sampler], list[Times], np.ndarray]:
        """The sequences whose prompts are read, their samplers, times and rows."""
        if self.writing is None:
            streams = [stream for stream in self.streams if not stream.reading]
            samplers = [stream.sampler for stream in streams if stream.sampler]
            rows = np.array([stream.row for stream in streams], np.int64)
            self.writing = streams, samplers, [stream.times for stream in streams], rows
        return self.writing

    def _step(self) -> None:
        """The next token of every sequence whose prompt is read. Rows between them whose prompts are not compute one
        for nothing, at a place that is written again."""
        streams, samplers, _, rows = self._writing()
        n = int(rows[-1]) + 1
        if n == 1 and len(guess := self._guess(streams[0])):
            self._check(streams, samplers, guess)
            return
        lengths = np.add(self.held.filled[:n], 1, out=self.lengths[:n])
        start = time.perf_counter()
        try:
            logits = self.model.decode(self.last[:n], lengths)
        except Exception as error:  # whatever it is, these sequences have failed and others may not
            self._fail(streams, error)
            return
        self.pace.stepped(time.perf_counter() - start)
        self.held.step(rows, self.last[rows])
        self._grow(streams, samplers, logits if len(rows) == n else logits[rows], len(rows))

    def _guess(self, stream: Stream) -> np.ndarray:
        """What a sequence that is alone may go on with, as far as it may go on."""
        most, row = stream.ticket.order.sampling.max_tokens - len(stream.tokens) - 1, stream.row
        return stream.guesses.next(np.append(self.held.tokens[row, : self.held.filled[row]], self.last[row]), most)

    def _check(self, streams: Sequence[Stream], samplers: Sequence[Sampler], guess: np.ndarray) -> None:
        """The next tokens of the sequence in the first row: for as long as they are what was guessed, the one after
        them is known, too."""
        [stream], row = streams, 0
        place, piece = int(self.held.filled[row]), np.append(self.last[row], guess)
        try:
            logits = self.model.score(row, piece, place)
        except Exception as error:  # whatever it is, this sequence has failed
            self._fail(streams, error)
            return
        self.held.taken[row] = max(self.held.taken[row], place + len(piece))
        for i in range(len(piece)):
            self.held.write(row, piece[i : i + 1])
            self._grow(streams, samplers, logits[i : i + 1], 0 if i else len(piece))
            if stream.ended or stream.row != row:
                return
            if i == len(guess) or self.last[row] != guess[i]:
                stream.guesses.learn(len(guess), i)
                return

    def _grow(self, streams: Sequence[Stream], samplers: Sequence[Sampler], logits: np.ndarray, computed: int) -> None:
        """One token more for each, by float32 [streams, vocabulary]."""
        try:
            sampled = sample(samplers, logits)
        except Exception as error:  # of one of them, and it is not known which
            self._fail(streams, error)
            return
        self._observe(streams, computed)
        leaving: list[Stream] = []
        for stream, found in zip(streams, sampled, strict=True):
            if stream.ended:  # given up with another of its order
                continue
            token, order = found.token, stream.ticket.order
            stream.log_probability += found.log_probability
            wanted = order.sampling
            if wanted.grammar is not None and stream.sampler is not None and stream.sampler.failure is not None:
                self.news.failed.append((stream.ticket, stream.sampler.failure))
                self._give_up(stream.ticket, "error")
                leaving += [other for other in self.running if other.ticket is stream.ticket]
                continue
            if token in self.ends and len(stream.tokens) >= wanted.min_tokens:
                self._finish(stream, "stop", 1)
                leaving.append(stream)
                continue
            stream.tokens.append(token)
            stream.log_probabilities.append(found.log_probability)
            if wanted.alternatives:
                stream.alternatives.append(found.alternatives)
            self.last[stream.row] = token
            if order.heard is not None:
                self.news.heard.append((stream, found))
            reason = self._reason(stream)
            if reason is not None:
                self._finish(stream, reason, 0)
                leaving.append(stream)
        if leaving:
            self._leave(list(dict.fromkeys(leaving)))

    def _reason(self, stream: Stream) -> Literal["stop", "length"] | None:
        """Why a sequence ends with the token that it just got, if it does."""
        wanted = stream.ticket.order.sampling
        if wanted.grammar is not None and stream.sampler is not None and stream.sampler.complete:
            return "stop"
        if wanted.stop and len(stream.tokens) >= wanted.min_tokens:
            tail = self.text(stream.tokens[-TOKENS_A_CHARACTER * max(map(len, wanted.stop)) - 1 :])
            if any(stop in tail for stop in wanted.stop):
                return "stop"
        return "length" if len(stream.tokens) >= wanted.max_tokens else None

    def _finish(self, stream: Stream, reason: Literal["stop", "length"], end: int) -> None:
        """end: tokens that count and are not told."""
        stream.ended, stream.times.end = True, end
        score = stream.log_probability / (len(stream.tokens) + end)
        candidate = Candidate(
            stream.tokens,
            stream.log_probabilities,
            stream.log_probability,
            score,
            reason,
            stream.alternatives,
            None,
        )
        self.news.finished.append((stream, candidate))
        seconds = time.perf_counter() - stream.times.scheduled
        self.order_seconds += 0.1 * (seconds - self.order_seconds)
        self._count(stream, reason)

    def _observe(self, grown: Sequence[Stream], computed: int) -> None:
        if self.metrics is not None:
            times = self.writing[2] if self.writing and grown is self.writing[0] else [s.times for s in grown]
            self.metrics.step(times, computed, time.perf_counter())

    def _count(self, stream: Stream, reason: FinishReason) -> None:
        if self.metrics is not None:
            self.metrics.finished(stream.times, reason, time.perf_counter())

    def _tell(self) -> None:
        """Everything that happened in a turn, at once."""
        news, now = self.news, time.perf_counter()
        if not (news.heard or news.finished or news.failed or now - self.told > ASKED_SECONDS):
            return
        self.news, self.told = _News(), now
        try:
            self.loop.call_soon_threadsafe(self._hear, news)
        except RuntimeError:  # the loop is closed: nobody waits for anything
            self.closed = True
            for ticket in [*self.waiting, *(stream.ticket for stream in self.running)]:
                self._give_up(ticket, "abort")
            self.waiting.clear()
            self._leave(list(self.running))

    def _hear(self, news: _News) -> None:
        """On the event loop."""
        for stream, found in news.heard:
            order = stream.ticket.order
            if order.heard is not None and not stream.ticket.future.done():
                _call(stream.ticket, order.heard, stream.number, found)
        for stream, candidate in news.finished:
            ticket = stream.ticket
            if ticket.order.done is not None and not ticket.future.done():
                _call(ticket, ticket.order.done, stream.number, candidate)
            ticket.candidates.append(candidate)
            if len(ticket.candidates) == len(ticket.streams) and not ticket.future.done():
                best = sorted(ticket.candidates, key=lambda candidate: -candidate.score)
                ticket.future.set_result(best[: ticket.order.sampling.n])
        for ticket, error in news.failed:
            _fail(ticket, error)
        now = time.perf_counter()
        if now - self.asked > ASKED_SECONDS:
            self.asked = now
            for ticket in list(self.open):
                if ticket.order.gone is not None and ticket.order.gone():
                    _fail(ticket, ClientGone())


def _call(ticket: Ticket, told: Callable[..., None], *news: object) -> None:
    """What one listener raises is the end of its own order."""
    try:
        told(*news)
    except Exception as error:
        log.exception("a listener failed")
        _fail(ticket, error)


def _fail(ticket: Ticket, error: Exception) -> None:
    if not ticket.future.done():
        ticket.future.set_exception(error)


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens at the front that are the same."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
