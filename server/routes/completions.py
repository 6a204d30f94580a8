"""POST /v1/completions: OpenAI's. A language model goes on with the prompt, a translation model translates it.

With stream=true every piece of text is sent as soon as it is certain, as server-sent events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import msgspec
from litestar import asgi
from litestar.types import Receive, Scope, Send

from server.completion import Completion, CompletionChoice, CompletionUsage, choice
from server.errors import request_id
from server.exchange import Exchange, decode_json, encoder, handle
from server.growing_text import GrowingText
from server.prompts import CompletionRequest, prompts_of
from server.rows import on_thread
from server.runtime.batcher import ClientGone
from server.runtime.decoding import Prompt
from server.runtime.model import Model
from server.runtime.search import Candidate
from server.runtime.writer import Writer

decoder = msgspec.json.Decoder(CompletionRequest)

# The place of a prompt, and a token of it or its answers.
Told = tuple[int, int | list[Candidate]]


async def completions(exchange: Exchange) -> bytes | AsyncGenerator[bytes, None]:
    """Completion as JSON, or the events of a stream."""
    request: CompletionRequest = decode_json(await exchange.body(), decoder)
    model = exchange.find(request.model, "complete")
    prompts = await on_thread(prompts_of, request, model.name, writer_of(model))
    answer = Completion(f"cmpl-{request_id(exchange.scope)}", int(time.time()), model.name)
    if request.stream:
        return events(exchange, model, request, prompts, answer)
    found: list[list[Candidate]] = [[] for _ in prompts]
    async with aclosing(what_is_told(exchange, model, prompts, tokens=False)) as told:
        async for place, candidates in told:
            assert isinstance(candidates, list), "tokens are told to streams"
            found[place] = candidates
    start = time.perf_counter()
    answer.choices = [
        choice(writer_of(model), prompt, place * prompt.options.n + i, candidate, request.logprobs)
        for place, (prompt, candidates) in enumerate(zip(prompts, found, strict=True))
        for i, candidate in enumerate(candidates)
    ]
    answer.usage = usage(exchange, model, prompts, found)
    body = encoder.encode(answer)
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


async def what_is_told(
    exchange: Exchange, model: Model, prompts: Sequence[Prompt], *, tokens: bool
) -> AsyncGenerator[Told, None]:
    """From the decoder: the place of a prompt with each of its tokens, where `tokens` are wanted, and at last with its
    candidates, as soon as it is finished. Raises as Exchange.submit and Exchange.result do."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Told | None] = asyncio.Queue()
    wanted = True

    def tell(told: Told) -> bool:
        loop.call_soon_threadsafe(queue.put_nowait, told)
        return wanted

    def asked(place: int, prompt: Prompt) -> Prompt:
        listener = (lambda token: tell((place, token))) if tokens else None
        return replace(prompt, listener=listener, done=lambda candidates: tell((place, candidates)))

    rows = [asked(place, prompt) for place, prompt in enumerate(prompts)]
    ticket = exchange.submit(model, rows, "complete", "prompt")
    ticket.future.add_done_callback(lambda _: queue.put_nowait(None))
    still_open = len(prompts)
    try:
        while still_open:
            told = await queue.get()
            if told is None:
                await exchange.result(ticket)
                return
            still_open -= isinstance(told[1], list)
            yield told
    finally:
        wanted = False
        ticket.future.cancel()


async def events(
    exchange: Exchange, model: Model, request: CompletionRequest, prompts: Sequence[Prompt], answer: Completion
) -> AsyncGenerator[bytes, None]:
    """A stream: every piece of text as it becomes certain, the end of every answer, then [DONE]."""
    growing = [GrowingText(writer_of(model).target.tokenizer, prompt.options.stop) for prompt in prompts]
    found: list[list[Candidate]] = [[] for _ in prompts]
    async with aclosing(what_is_told(exchange, model, prompts, tokens=True)) as told:
        async for place, news in told:
            if exchange.gone():
                raise ClientGone
            if isinstance(news, int):
                if text := growing[place].add(news):
                    yield event(answer, CompletionChoice(text, place))
                continue
            found[place] = news
            last = choice(writer_of(model), prompts[place], place, news[0], None)
            last.text = growing[place].rest(last.text)
            yield event(answer, last)
    answer.usage = usage(exchange, model, prompts, found)
    if request.stream_options is not None and request.stream_options.include_usage:
        yield event(answer)
    yield b"data: [DONE]\n\n"


def event(answer: Completion, *choices: CompletionChoice) -> bytes:
    """One server-sent event."""
    answer.choices = list(choices)
    return b"data: " + encoder.encode(answer) + b"\n\n"


def writer_of(model: Model) -> Writer:
    assert model.writer is not None, "a model that completes has one"
    return model.writer


def usage(
    exchange: Exchange, model: Model, prompts: Sequence[Prompt], found: Sequence[Sequence[Candidate]]
) -> CompletionUsage:
    """Of a request, counted by the metrics, too."""
    read = sum(map(len, prompts))
    written = sum(len(candidate.tokens) for candidates in found for candidate in candidates)
    counted = exchange.metrics.generation.of(model.name, str(model.version))
    counted.prompt_tokens += read
    counted.generation_tokens += written
    return CompletionUsage(read, written, read + written)


@asgi("/v1/completions", copy_scope=False)
async def completions_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/completions", scope, receive, send, completions)


handlers = [completions_route]
