"""A front-end's end of the memory that it shares with the inference process.

Requests that the same turn of the event loop brings go there together: as one call, one block, and one answer, so that
neither process pays for each of them. While as many calls to a model are under way as it can run and one more, further
requests are held until one of these is answered or they fill a batch: the more there is to do, the more goes together.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable

from server.frontends.blocks import Layout, read_arrays
from server.frontends.messages import ANSWER, Answered, Call, LargeCall, Status, answered_of
from server.frontends.proxy import lost
from server.frontends.region import FLAGS, Region, shared
from server.frontends.remote import RemoteModel
from server.frontends.ring import Ring
from server.frontends.slab import Slab
from server.runtime.batcher import Block, ClientGone, DeadlinePassed, Overloaded, QueueFull, RunFailed, Ticket, Wanted

# Requests with less time than this are never held, and go with those whose deadlines are no further apart. The latest
# deadline holds for all that go together; whose own was passed when they were run, is told so.
URGENT_SECONDS = 1.0
DEADLINES_APART = 0.005
# How often it is looked whether clients have gone that wait for longer than this.
GONE_SECONDS = 0.025


class Group:
    """A call under way. place: of its block in the slab, None where it has memory of its own. open: its requests that
    are not answered."""

    __slots__ = ("model", "number", "open", "place", "size", "tickets", "wanted")

    def __init__(self, number: int, model: RemoteModel, wanted: Wanted, tickets: list[Ticket]) -> None:
        self.number, self.model, self.wanted, self.tickets = number, model, wanted, tickets
        self.place: int | None = None
        self.size = 0
        self.open = len(tickets)


class Pending:
    """Requests that go together, next. patient: they may be held."""

    __slots__ = ("model", "patient", "priority", "rows", "tickets", "wanted")

    def __init__(self, model: RemoteModel, wanted: Wanted, priority: int, patient: bool) -> None:
        self.model, self.wanted, self.priority, self.patient = model, wanted, priority, patient
        self.tickets: list[Ticket] = []
        self.rows = 0

    def waits(self) -> bool:
        model = self.model
        return self.patient and model.flying >= model.most_calls and self.rows < model.most_rows


class Link:
    """Calls, and the requests that wait for their answers."""

    def __init__(
        self, region: Region, calls_wake: int, answers_wake: int, send: Callable[[LargeCall, list[int]], None]
    ) -> None:
        """calls_wake, answers_wake: the eventfds of the inference process and of this one. send: over the control
        socket."""
        self.loop = asyncio.get_running_loop()
        self.calls, self.answers = Ring(region.calls, calls_wake), Ring(region.answers, answers_wake)
        self.memory, self.gone, self.slab = region.slab, region.gone, Slab(len(region.slab))
        self.send = send
        self.groups: dict[int, Group] = {}
        self.flags = list(range(FLAGS))
        self.unflagged = FLAGS  # numbers of calls that have no flag
        self.pending: dict[tuple[int, Wanted, int, int], Pending] = {}
        self.scheduled = self.lost = False
        self.looking: asyncio.TimerHandle | None = None
        self.looked_at: list[int] = []
        self.answers.arm()
        self.loop.add_reader(answers_wake, self._woken)

    def submit(self, model: RemoteModel, ticket: Ticket, priority: int) -> None:
        if self.lost:
            ticket.future.set_exception(lost())
            return
        patient = not model.cached and priority <= 0 and ticket.deadline - ticket.queued > URGENT_SECONDS
        apart = id(ticket) if model.cached else int(ticket.deadline / DEADLINES_APART)
        key = (model.number, ticket.wanted, priority, 0 if patient else apart)
        if (pending := self.pending.get(key)) is None:
            pending = self.pending[key] = Pending(model, ticket.wanted, priority, patient)
        pending.tickets.append(ticket)
        pending.rows += ticket.rows
        if not self.scheduled:
            # At the end of this turn of the loop: with it go the requests that the same poll brought.
            self.scheduled = True
            self.loop.call_soon(self._flush)

    def lose(self) -> None:
        """The inference process is gone: nobody will be answered."""
        self.lost = True
        self.loop.remove_reader(self.answers.wake)
        tickets = [ticket for pending in self.pending.values() for ticket in pending.tickets]
        tickets += [ticket for group in self.groups.values() for ticket in group.tickets]
        self.pending.clear()
        self.groups.clear()
        self._fail(tickets, lost())

    def _flush(self) -> None:
        self.scheduled = False
        pending, self.pending = self.pending, {}
        for key, one in pending.items():
            if one.waits():
                self.pending[key] = one
                continue
            part: list[Ticket] = []
            rows = 0
            for ticket in one.tickets:
                if ticket.future.done():  # cancelled
                    continue
                if part and rows + ticket.rows > one.model.most_rows:
                    self._send(one, part)
                    part, rows = [], 0
                part.append(ticket)
                rows += ticket.rows
            one.tickets, one.rows = part, rows
            if part and one.waits():
                self.pending[key] = one
            elif part:
                self._send(one, part)
        self.calls.publish()
        if self.looking is None and self.groups:
            self.looking = self.loop.call_later(GONE_SECONDS, self._look)

    def _send(self, pending: Pending, tickets: list[Ticket]) -> None:
        model, wanted = pending.model, pending.wanted
        if self.flags:
            number = self.flags.pop()
            self.gone[number] = 0
        else:
            number = self.unflagged = self.unflagged + 1
        code, takes, _ = model.plan(wanted)
        group = self.groups[number] = Group(number, model, wanted, tickets)
        model.flying += 1
        blocks, counts = [ticket.block for ticket in tickets], [ticket.rows for ticket in tickets]
        group.size = takes.size(blocks)
        group.place = self.slab.allocate(group.size)
        head = Call(
            *(number, model.number, sum(counts), len(counts), pending.priority, code, group.place or 0, group.size),
            max([ticket.deadline for ticket in tickets]),
        ).packed(counts)
        try:
            self._write(group, takes, blocks, head)
        except Exception as error:  # rows that are none of this model's
            self._forget(group)
            self._fail(tickets, RunFailed(str(error)), error)

    def _write(self, group: Group, takes: Layout, blocks: list[Block], head: bytes) -> None:
        """Into the shared memory, or where that is too full, into memory of their own."""
        if group.place is not None:
            takes.write(blocks, self.memory[group.place : group.place + group.size])
            if (room := self.calls.reserve(len(head))) is not None:
                room[:] = head
                return
            self.slab.release(group.place, group.size)
            group.place = None
        descriptor = shared("rows", group.size)
        try:
            with mmap.mmap(descriptor, group.size) as memory, memoryview(memory) as view:
                takes.write(blocks, view)
        except BaseException:
            os.close(descriptor)
            raise
        self.send(LargeCall(head), [descriptor])

    def _forget(self, group: Group) -> None:
        """It is answered: its memory and its number are free."""
        del self.groups[group.number]
        group.model.flying -= 1
        if self.pending and not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self._flush)
        if group.place is not None:
            self.slab.release(group.place, group.size)
        if group.number < FLAGS:
            self.flags.append(group.number)

    def _fail(self, tickets: list[Ticket], failure: Exception, cause: Exception | None = None) -> None:
        failure.__cause__ = cause
        for ticket in tickets:
            if not ticket.future.done():
                ticket.future.set_exception(failure)

    def _woken(self) -> None:
        self.answers.woken()
        for record in self.answers.records():
            self.answered(record)
        self.answers.release()

    def answered(self, record: memoryview) -> None:
        """Give the requests of a call, or some of them, their answer."""
        answer = answered_of(record)
        group = self.groups[answer.number]
        tickets = group.tickets[answer.first : answer.first + answer.requests]
        group.open -= answer.requests
        if group.open == 0:
            self._forget(group)
        group.model.told(answer.requests, answer.wait)
        rest = record[ANSWER.size :]
        if answer.status != Status.ANSWERED:
            self._fail(tickets, failure(answer, bytes(rest)))
            return
        try:
            value = group.model.value(group.wanted, list(read_arrays(rest)))
        except Exception as error:  # as where it is made beside the run
            self._fail(tickets, RunFailed(str(error)), error)
            return
        whole, first = isinstance(group.wanted, str), 0
        for place, ticket in enumerate(tickets):
            ticket.started, ticket.finished = answer.started, answer.finished
            ticket.inference, ticket.batch_rows = answer.inference, answer.batch_rows
            if place:  # of the first, the batcher has
                group.model.queue_seconds.observe(answer.started - ticket.queued)
            last = first + ticket.rows
            if not ticket.future.done():
                if answer.started > ticket.deadline:  # its own, which is sooner than that of the call
                    group.model.rejected[group.model.name, "deadline"] += 1
                    ticket.future.set_exception(DeadlinePassed())
                elif len(tickets) == 1:
                    ticket.future.set_result(value)
                elif whole:
                    ticket.future.set_result(value[first:last])
                else:
                    ticket.future.set_result([array[first:last] for array in value])
            first = last

    def _look(self) -> None:
        """Whether clients have gone that have waited since the last look; a call that nobody waits for is not run."""
        for number in self.looked_at:
            if (group := self.groups.get(number)) is None:
                continue
            for ticket in group.tickets:
                if not ticket.future.done() and ticket.gone is not None and ticket.gone():
                    ticket.future.set_exception(ClientGone())
            if number < FLAGS and all(ticket.future.done() for ticket in group.tickets):
                self.gone[number] = 1
        self.looked_at = list(self.groups)
        self.looking = self.loop.call_later(GONE_SECONDS, self._look) if self.groups else None


def failure(answer: Answered, words: bytes) -> Exception:
    match answer.status:
        case Status.QUEUE_FULL:
            return QueueFull(answer.retry_after, words.decode())
        case Status.OVERLOADED:
            found = Overloaded(answer.retry_after, answer.wait)
            found.args = (words.decode(),)
            return found
        case Status.DEADLINE_PASSED:
            return DeadlinePassed()
        case Status.CLIENT_GONE:
            return ClientGone()
        case _:
            return RunFailed(words.decode())
