"""A front-end's end of the memory that it shares with the inference process.

Requests that the same turn of the event loop brings go there together: as one call, one block, and one answer, so that
neither process pays for each of them.
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

# Requests whose deadlines are no further apart go together; the latest holds for all of them.
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
        self.pending: dict[tuple[int, Wanted, int, int], tuple[RemoteModel, list[Ticket]]] = {}
        self.scheduled = self.lost = False
        self.looking: asyncio.TimerHandle | None = None
        self.looked_at: list[int] = []
        self.answers.arm()
        self.loop.add_reader(answers_wake, self._woken)

    def submit(self, model: RemoteModel, ticket: Ticket, priority: int) -> None:
        if self.lost:
            ticket.future.set_exception(lost())
            return
        together = id(ticket) if model.cached else int(ticket.deadline / DEADLINES_APART)
        key = (model.number, ticket.wanted, priority, together)
        if (pending := self.pending.get(key)) is None:
            self.pending[key] = model, [ticket]
        else:
            pending[1].append(ticket)
        if not self.scheduled:
            # At the end of this turn of the loop: with it go the requests that the same poll brought.
            self.scheduled = True
            self.loop.call_soon(self._flush)

    def lose(self) -> None:
        """The inference process is gone: nobody will be answered."""
        self.lost = True
        self.loop.remove_reader(self.answers.wake)
        tickets = [ticket for _, pending in self.pending.values() for ticket in pending]
        tickets += [ticket for group in self.groups.values() for ticket in group.tickets]
        self.pending.clear()
        self.groups.clear()
        self._fail(tickets, lost())

    def _flush(self) -> None:
        self.scheduled = False
        pending, self.pending = self.pending, {}
        for (_, wanted, priority, _), (model, tickets) in pending.items():
            part: list[Ticket] = []
            rows = 0
            for ticket in tickets:
                if ticket.future.done():  # cancelled
                    continue
                if part and rows + ticket.rows > model.most_rows:
                    self._send(model, wanted, priority, part)
                    part, rows = [], 0
                part.append(ticket)
                rows += ticket.rows
            if part:
                self._send(model, wanted, priority, part)
        self.calls.publish()
        if self.looking is None and self.groups:
            self.looking = self.loop.call_later(GONE_SECONDS, self._look)

    def _send(self, model: RemoteModel, wanted: Wanted, priority: int, tickets: list[Ticket]) -> None:
        if self.flags:
            number = self.flags.pop()
            self.gone[number] = 0
        else:
            number = self.unflagged = self.unflagged + 1
        group = self.groups[number] = Group(number, model, wanted, tickets)
        takes, blocks, counts = model.takes(wanted), [ticket.block for ticket in tickets], [t.rows for t in tickets]
        group.size = takes.size(blocks)
        group.place = self.slab.allocate(group.size)
        head = Call(
            number,
            model.number,
            sum(counts),
            len(counts),
            priority,
            model.code(wanted),
            group.place or 0,
            group.size,
            max(ticket.deadline for ticket in tickets),
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
            ticket.queued, ticket.started, ticket.finished = answer.queued, answer.started, answer.finished
            ticket.inference, ticket.batch_rows = answer.inference, answer.batch_rows
            if place:  # of the first, the batcher has
                group.model.queue_seconds.observe(answer.started - answer.queued)
            last = first + ticket.rows
            if not ticket.future.done():
                if len(tickets) == 1:
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
