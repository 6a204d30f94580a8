"""One request to a language model's engine: its orders, waiting for them, and the events of its stream.

A client that leaves frees its slots at once: its orders are cancelled, streamed or not.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from export.processing.inputs import BadInput
from export.processing.text import TextProcessor
from server.event_lines import EventLines
from server.exchange import AsgiExchange, no_room
from server.growing_text import GrowingText, before
from server.runtime.batcher import ClientGone, QueueFull
from server.runtime.language import LanguageModel
from server.runtime.model import Model
from server.runtime.orders import Order, Ticket
from server.runtime.sampling import Sampled, Sampling
from server.runtime.search import Candidate
from server.sampling_request import wrong


@dataclass(frozen=True)
class Asked:
    """A prompt, what is wanted of it, and the text that answers begin with. scores: of the prompt's tokens but the
    first, once they are known; None: they are not wanted."""

    tokens: list[int]
    sampling: Sampling
    echo: str = ""
    scores: list[Sampled] | None = None


class Told(NamedTuple):
    """One token of a text as it is told. log_probability: NaN of the first token of a prompt, which follows nothing.
    offset: where its text begins, in characters."""

    token: int
    log_probability: float
    alternatives: dict[int, float]
    offset: int


Hears = Callable[[int, Sampled], None]
Ends = Callable[[int, Candidate], None]


def told(texts: TextProcessor, candidate: Candidate, offset: int) -> list[Told]:
    """The tokens of an answer that begins at `offset`."""
    others = candidate.alternatives or [{}] * len(candidate.tokens)
    return placed(texts, map(Sampled, candidate.tokens, candidate.log_probabilities, others), offset)


def told_prompt(texts: TextProcessor, asked: Asked) -> list[Told]:
    """The tokens of a prompt that an answer begins with, where their scores are wanted."""
    if asked.scores is None:
        return []
    return placed(texts, [Sampled(asked.tokens[0], math.nan), *asked.scores], 0)


def placed(texts: TextProcessor, tokens: Iterable[Sampled], offset: int) -> list[Told]:
    growing, found = GrowingText(texts.tokenizer, ()), []
    for one in tokens:
        found.append(Told(one.token, one.log_probability, one.alternatives, offset + growing.length))
        growing.add(one.token)
    return found


def language_of(model: Model) -> LanguageModel:
    assert model.language is not None, "a model that completes and is no translation has one"
    return model.language


async def answers(exchange: AsgiExchange, model: Model, asked: Sequence[Asked]) -> list[list[Candidate]]:
    """The candidates of each prompt. Raises as `ordered` and AsgiExchange.result do, and ClientGone."""
    async with ordered(exchange, model, asked, [(None, None)] * len(asked)) as (tickets, left):
        whole = asyncio.gather(*(ticket.future for ticket in tickets))
        waited: set[asyncio.Future[Any]] = {whole, left}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            whole.cancel()
            raise ClientGone
        return await exchange.result(whole)


@asynccontextmanager
async def ordered(
    exchange: AsgiExchange, model: Model, asked: Sequence[Asked], listeners: Iterable[tuple[Hears | None, Ends | None]]
) -> AsyncIterator[tuple[list[Ticket], asyncio.Task[None]]]:
    """Tickets of a request's orders, and a task that ends when the client leaves. With the context they are given up.

    Raises ApiError 400 for more orders than may ever wait, and for a grammar that cannot be followed to its end, 429
    where there is no room now.
    """
    exchange.orders = tickets = list[Ticket]()
    left = asyncio.create_task(exchange.left())
    try:
        engine = model.engine
        assert engine is not None, "a language model has one"
        exchange.begin(model, len(asked), "prompt")
        until = None if exchange.asked_timeout is None else exchange.start + exchange.asked_timeout
        for one, (heard, done) in zip(asked, listeners, strict=True):
            deadline = exchange.start + exchange.timeout
            order = Order(one.tokens, one.sampling, deadline, until, None, heard, done, exchange.start, one.scores)
            try:
                tickets.append(engine.submit(order))
            except QueueFull as error:
                exchange.metrics.rejected[model.name, "queue_full"] += 1
                raise no_room(model, error) from error
        yield tickets, left
    except BadInput as error:  # a grammar that grew too large on its way
        raise wrong("response_format", str(error)) from error
    finally:
        left.cancel()
        if exchange.caller is not None:
            exchange.caller.spend(sum(ticket.tokens for ticket in tickets))
        for ticket in tickets:
            if not ticket.future.cancel() and not ticket.future.cancelled():
                ticket.future.exception()  # of several that failed, one is told


class Answer:
    """One sequence of a stream. echoes: its prompt is still to be told, with its scores."""

    __slots__ = ("asked", "echoes", "growing", "pending")

    def __init__(self, growing: GrowingText, asked: Asked) -> None:
        self.growing, self.asked = growing, asked
        self.echoes = asked.scores is not None
        self.pending: list[Told] = []


class Stream:
    """Turns tokens into events, and keeps these until they are sent: those that come together go together."""

    def __init__(
        self,
        language: LanguageModel,
        asked: Sequence[Asked],
        lines: EventLines,
        note: Callable[[list[Told]], Any] | None,
    ) -> None:
        """note: log-probabilities of tokens as the events show them; None: they do not."""
        self.texts, self.lines, self.note = language.texts, lines, note
        self.events: list[bytes] = []
        self.open = sum(one.sampling.n for one in asked)
        self.written = 0
        self.waiting: asyncio.Future[None] | None = None
        self.answers: dict[int, Answer] = {}
        self.asked = asked

    def listeners(self) -> Iterable[tuple[Hears, Ends]]:
        """For each order: its sequences are numbered through those of all orders."""
        first = 0
        for one in self.asked:
            for place in range(one.sampling.n):
                growing = GrowingText(self.texts.tokenizer, one.sampling.stop)
                self.answers[first + place] = Answer(growing, one)
            yield partial(self.heard, first), partial(self.done, first, one)
            first += one.sampling.n

    def heard(self, first: int, place: int, sampled: Sampled) -> None:
        answer = self.answers[first + place]
        if self.note is not None:
            offset = len(answer.asked.echo) + answer.growing.length
            answer.pending.append(Told(sampled.token, sampled.log_probability, sampled.alternatives, offset))
        if text := answer.growing.add(sampled.token):
            self.say(first + place, answer, text, None)

    def done(self, first: int, asked: Asked, place: int, candidate: Candidate) -> None:
        answer = self.answers[first + place]
        whole = before(self.texts.decode(candidate.tokens), asked.sampling.stop)
        self.open -= 1
        self.written += len(candidate.tokens)
        self.say(first + place, answer, answer.growing.rest(whole), candidate.finish_reason)

    def say(self, index: int, answer: Answer, text: str, reason: str | None) -> None:
        noted = None
        if answer.echoes:
            answer.echoes = False
            answer.pending = told_prompt(self.texts, answer.asked) + answer.pending
            text = answer.asked.echo + text
        if self.note is not None and answer.pending:
            noted, answer.pending = self.note(answer.pending), []
        self.events.append(self.lines.event(index, text, noted, reason))
        self.wake()

    def wake(self, _: object = None) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)

    async def news(self) -> bytes:
        """What is to be sent, as soon as there is something, or something has happened."""
        if not self.events and self.open:
            self.waiting = asyncio.get_running_loop().create_future()
            await self.waiting
        sent, self.events = b"".join(self.events), []
        return sent


async def events(
    exchange: AsgiExchange,
    model: Model,
    asked: Sequence[Asked],
    lines: EventLines,
    note: Callable[[list[Told]], Any] | None,
    usage: Callable[[int], Any] | None,
) -> AsyncGenerator[bytes, None]:
    """A stream: what is new, as soon as it is certain, then [DONE]. usage: of so many tokens, where it is wanted.

    Raises as `answers` does.
    """
    stream = Stream(language_of(model), asked, lines, note)
    async with ordered(exchange, model, asked, list(stream.listeners())) as (tickets, left):
        for ticket in tickets:
            ticket.future.add_done_callback(stream.wake)
        left.add_done_callback(stream.wake)
        first = 0
        for one in asked:
            for index in range(first, first := first + one.sampling.n):
                if one.echo and one.scores is None:
                    stream.events.append(lines.event(index, one.echo, None, None))
        while stream.open:
            if news := await stream.news():
                yield news
            if left.done():
                raise ClientGone
            for ticket in tickets:
                if ticket.future.done():
                    await exchange.result(ticket.future)  # raises what went wrong
        if news := await stream.news():
            yield news
    if usage is not None:
        yield lines.usage(usage(stream.written))
    yield b"data: [DONE]\n\n"
