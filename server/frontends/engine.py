"""The inference process's end of the memory that it shares with one front-end.

Calls are taken from the ring, all that there are at a wake-up, and queued as one block each; rows are not copied
before the session reads them. Answers are written when a batch is done, and one wake-up serves all of them.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np

from server.frontends.blocks import Layout, arrays_size, latent, layout, write_arrays
from server.frontends.messages import (
    ALL,
    ANSWER,
    GENERATE,
    Answered,
    Call,
    LargeAnswer,
    LargeCall,
    Meaning,
    Offer,
    Serve,
    Status,
    call_of,
)
from server.frontends.region import FLAGS, Region, shared, whole
from server.frontends.ring import Ring
from server.runtime.batcher import Block, ClientGone, DeadlinePassed, Overloaded, QueueFull, Ticket, Wanted
from server.runtime.model import Model
from server.runtime.repository import Repository

GENERATED: Wanted = "generate"
# More than are ever under way.
MOST_CALLS = 2**31


class Offered:
    """A model as a front-end knows it; it is held for as long as that may ask for it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.layout = layout(model.manifest)
        self.latent = latent(model.generator.latent) if model.generator is not None else None
        self.outputs = tuple(output.name for output in model.manifest.outputs)
        self.wanted: dict[int, Wanted] = {GENERATE: GENERATED, ALL: self.outputs}
        model.requests += 1

    def asked(self, code: int) -> tuple[Wanted, Layout]:
        """What Call.wanted stands for, and how the rows lie in memory."""
        if (wanted := self.wanted.get(code)) is None:
            wanted = tuple(output for place, output in enumerate(self.outputs) if code >> place & 1)
            self.wanted[code] = wanted
        if wanted is GENERATED:
            assert self.latent is not None, "it is asked of what generates"
            return wanted, self.latent
        return wanted, self.layout


class Bridge:
    """One front-end, from its start to its end."""

    def __init__(
        self,
        region: Region,
        calls_wake: int,
        answers_wake: int,
        send: Callable[[LargeAnswer, list[int]], None],
        rejected: defaultdict[tuple[str, str], int],
    ) -> None:
        """calls_wake, answers_wake: the eventfds of this process and of the front-end. send: over the control socket.
        rejected: requests by model and reason (Metrics.rejected)."""
        self.loop = asyncio.get_running_loop()
        self.calls, self.answers = Ring(region.calls, calls_wake), Ring(region.answers, answers_wake)
        self.memory, self.flags, self.send = region.slab, region.gone, send
        self.rejected = rejected
        self.models: dict[int, Offered] = {}
        self.numbers = itertools.count(1)
        self.open = True
        self.scheduled = False
        self.calls.arm()
        self.loop.add_reader(calls_wake, self._woken)

    def serve(self, number: int, repository: Repository) -> Serve:
        """What the front-end is to serve from now on, as the change of this number."""
        known = {id(offered.model): known_as for known_as, offered in self.models.items()}
        new, names = [], {}
        for name, view in repository.views.items():
            ready = {}
            for version, model in repository.ready[name].items():
                if (known_as := known.get(id(model))) is None:
                    known_as = next(self.numbers)
                    self.models[known_as] = Offered(model)
                    new.append(offer(known_as, model, repository))
                ready[version] = known_as
            names[name] = Meaning(view, ready)
        return Serve(number, new, names)

    def let(self, numbers: list[int]) -> None:
        """The front-end asks these models no more."""
        for number in numbers:
            self.models.pop(number).model.requests -= 1

    def close(self) -> None:
        """The front-end has ended. Of what it asked nothing is run that has not begun."""
        self.open = False
        self.loop.remove_reader(self.calls.wake)
        self.let(list(self.models))
        os.close(self.calls.wake)
        os.close(self.answers.wake)

    def large_call(self, message: LargeCall, descriptor: int) -> None:
        """A call whose block has memory of its own."""
        call, counts = call_of(message.head)
        self._call(call, counts, whole(descriptor))

    def _woken(self) -> None:
        self.calls.woken()
        for record in self.calls.records():
            call, counts = call_of(record)
            self._call(call, counts, self.memory[call.place : call.place + call.size])
        self.calls.release()

    def _call(self, call: Call, counts: tuple[int, ...], memory: memoryview) -> None:
        offered = self.models[call.model]
        wanted, lies = offered.asked(call.wanted)
        self._submit(offered.model, wanted, call, 0, counts, lies.read(call.rows, memory))

    def _submit(
        self, model: Model, wanted: Wanted, call: Call, first: int, counts: tuple[int, ...], block: Block
    ) -> bool:
        """Queue the rows of requests of a call, from the `first` on; where there is no room for all, for as many of
        them as there is. Whether there was for all."""
        gone = self._gone if call.number >= FLAGS else partial(self._gone, call.number)
        try:
            ticket = model.submit(block, wanted, deadline=call.deadline, gone=gone, priority=call.priority)
        except QueueFull as error:
            if len(counts) == 1:
                self._refuse(model, call, first, 1, error)
                return False
            half = len(counts) // 2
            rows = sum(counts[:half])
            # The batcher has counted one that is refused, and some of these may not be.
            self.rejected[model.name, reason_of(error)] -= 1
            if self._submit(model, wanted, call, first, counts[:half], block[:rows]):
                return self._submit(model, wanted, call, first + half, counts[half:], block[rows:])
            self.rejected[model.name, reason_of(error)] += len(counts) - half
            self._refuse(model, call, first + half, len(counts) - half, error)
            return False
        ticket.future.add_done_callback(partial(self._done, model, ticket, call.number, first, len(counts)))
        return True

    def _refuse(self, model: Model, call: Call, first: int, requests: int, error: QueueFull) -> None:
        status = Status.OVERLOADED if isinstance(error, Overloaded) else Status.QUEUE_FULL
        answered = Answered(call.number, first, requests, status, error.retry_after, 0, wait_of(model))
        self._answer(answered, str(error).encode())

    def _gone(self, number: int | None = None) -> bool:
        return not self.open or (number is not None and self.flags[number] == 1)

    def _done(
        self, model: Model, ticket: Ticket, number: int, first: int, requests: int, future: asyncio.Future[Any]
    ) -> None:
        error = future.exception()
        if not self.open:  # nobody is told
            return
        found: list[np.ndarray] | bytes = b""
        retry_after, reason = 0, ""
        if error is None:
            status, value = Status.ANSWERED, future.result()
            found = [np.asarray(value)] if isinstance(ticket.wanted, str) else value
        elif isinstance(error, DeadlinePassed):
            status, reason = Status.DEADLINE_PASSED, "deadline"
        elif isinstance(error, ClientGone):
            status, reason = Status.CLIENT_GONE, "gone"
        elif isinstance(error, QueueFull):  # one of higher priority took its room
            status, reason, retry_after = Status.QUEUE_FULL, "queue_full", error.retry_after
            found = str(error).encode()
        else:
            status, found = Status.RUN_FAILED, str(error).encode()
        if reason and requests > 1:  # of the first, the batcher has counted it
            self.rejected[model.name, reason] += requests - 1
        answered = Answered(
            *(number, first, requests, status, retry_after, ticket.batch_rows, wait_of(model)),
            *(ticket.queued, ticket.started, ticket.finished, ticket.inference),
        )
        self._answer(answered, found)

    def _answer(self, answered: Answered, found: list[np.ndarray] | bytes) -> None:
        size = ANSWER.size + (len(found) if isinstance(found, bytes) else arrays_size(found))
        if (room := self.answers.reserve(size)) is not None:
            write(room, answered, found)
            if not self.scheduled:
                self.scheduled = True
                self.loop.call_soon(self._publish)
            return
        descriptor = shared("answer", size)
        with mmap.mmap(descriptor, size) as memory, memoryview(memory) as view:
            write(view, answered, found)
        self.send(LargeAnswer(), [descriptor])

    def _publish(self) -> None:
        self.scheduled = False
        if self.open:
            self.answers.publish()


def write(room: memoryview, answered: Answered, found: list[np.ndarray] | bytes) -> None:
    ANSWER.pack_into(room, 0, *answered)
    if isinstance(found, bytes):
        room[ANSWER.size :] = found
    else:
        write_arrays(found, room[ANSWER.size :])


def offer(number: int, model: Model, repository: Repository) -> Offer:
    batcher = model.batcher
    most, parallel = (1, 1) if batcher is None else (batcher.max_batch_size, max(1, batcher.parallel))
    # Where the batcher chooses from what waits, by length, or waits for more, it is to see all that there is.
    chooses = batcher is not None and (batcher.length is not None or batcher.max_queue_delay > 0 or batcher.preferred)
    return Offer(
        number,
        msgspec.json.encode(model.manifest),
        str(repository.folder.resolve() / model.name / str(model.version)),
        sorted(model.answers),
        model.raw,
        model.provider,
        model.timeout,
        model.queue_limit,
        most,
        MOST_CALLS if chooses else parallel + 1,
        2 * most * parallel,
        model.cache is not None,
    )


def wait_of(model: Model) -> float:
    """Seconds until a request that came now would be answered, where others wait."""
    batcher = model.batcher
    if batcher is None or not batcher.waiting_rows:
        return 0.0
    return batcher.expected_wait(0) + batcher.run_seconds


def reason_of(error: QueueFull) -> str:
    """As the metrics name it."""
    return "overload" if isinstance(error, Overloaded) else "queue_full"
