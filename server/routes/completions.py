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

from server.completion import (
    Completion,
    CompletionUsage,
    LogProbabilities,
    continuation,
    log_probabilities,
    translation,
    usage,
)
from server.event_lines import EventLines
from server.exchange import AsgiExchange, decode_json, encoder, handle
from server.generating import Asked, Told, answers, language_of
from server.generating import events as generated_events
from server.growing_text import GrowingText
from server.prompts import CompletionRequest, orders_of, sources_of
from server.rows import on_thread
from server.runtime.batcher import ClientGone
from server.runtime.decoding import Prompt
from server.runtime.model import Model
from server.runtime.search import Candidate
from server.runtime.writer import Writer

decoder = msgspec.json.Decoder(CompletionRequest)

# The place of a prompt, and a token of it or its answers.
News = tuple[int, int | list[Candidate]]


async def completions(exchange: AsgiExchange) -> bytes | AsyncGenerator[bytes, None]:
    """Completion as JSON, or the events of a stream."""
    request: CompletionRequest = decode_json(await exchange.body(), decoder)
    model = await exchange.find(request.model, "complete")
    answer = Completion(
        id=f"cmpl-{exchange.request_id}",
        created=int(time.time()),
        model=model.name,
        system_fingerprint=model.fingerprint,
    )
    if model.engine is None:
        return await translate(exchange, model, request, answer)
    language = language_of(model)
    asked = await on_thread(orders_of, request, language)
    if request.stream:
        return stream(exchange, model, request, asked, answer)
    found = await answers(exchange, model, asked)
    start = time.perf_counter()
    answer.choices = [
        continuation(language.texts, candidate, index, one, request.logprobs)
        for index, (one, candidate) in enumerate(
            (one, candidate) for one, candidates in zip(asked, found, strict=True) for candidate in candidates
        )
    ]
    answer.usage = usage(read(asked), sum(len(candidate.tokens) for row in found for candidate in row))
    body = encoder.encode(answer)
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


def read(asked: Sequence[Asked]) -> int:
    return sum(len(one.tokens) for one in asked)


def stream(
    exchange: AsgiExchange, model: Model, request: CompletionRequest, asked: Sequence[Asked], answer: Completion
) -> AsyncGenerator[bytes, None]:
    texts, others = language_of(model).texts, request.logprobs

    def note(tokens: list[Told]) -> LogProbabilities:
        return log_probabilities(texts, tokens, others or 0)

    wanted = request.stream_options is not None and request.stream_options.include_usage
    return generated_events(
        exchange,
        model,
        asked,
        EventLines(answer, before=b'"text":', behind=b""),
        None if others is None else note,
        (lambda written: usage(read(asked), written)) if wanted else None,
    )


async def translate(
    exchange: AsgiExchange, model: Model, request: CompletionRequest, answer: Completion
) -> bytes | AsyncGenerator[bytes, None]:
    writer = writer_of(model)
    prompts = await on_thread(sources_of, request, model.name, writer)
    if request.stream:
        return translation_events(exchange, model, request, prompts, answer)
    found: list[list[Candidate]] = [[] for _ in prompts]
    async with aclosing(what_is_told(exchange, model, prompts, tokens=False)) as told:
        async for place, candidates in told:
            assert isinstance(candidates, list), "tokens are told to streams"
            found[place] = candidates
    start = time.perf_counter()
    answer.choices = [
        translation(writer, prompt, place * prompt.options.n + i, candidate, request.logprobs)
        for place, (prompt, candidates) in enumerate(zip(prompts, found, strict=True))
        for i, candidate in enumerate(candidates)
    ]
    answer.usage = counted(exchange, model, prompts, found)
    body = encoder.encode(answer)
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


async def what_is_told(
    exchange: AsgiExchange, model: Model, prompts: Sequence[Prompt], *, tokens: bool
) -> AsyncGenerator[News, None]:
    """From the decoder: the place of a prompt with each of its tokens, where `tokens` are wanted, and at last with its
    candidates, as soon as it is finished. Raises as AsgiExchange.submit and AsgiExchange.result do."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[News | None] = asyncio.Queue()
    wanted = True

    def tell(told: News) -> bool:
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
                await exchange.result(ticket.future)
                return
            still_open -= isinstance(told[1], list)
            yield told
    finally:
        wanted = False
        ticket.future.cancel()


async def translation_events(
    exchange: AsgiExchange, model: Model, request: CompletionRequest, prompts: Sequence[Prompt], answer: Completion
) -> AsyncGenerator[bytes, None]:
    """A stream: every piece of text as it becomes certain, the end of every answer, then [DONE]."""
    writer, lines = writer_of(model), EventLines(answer, before=b'"text":', behind=b"")
    growing = [GrowingText(writer.target.tokenizer, prompt.options.stop) for prompt in prompts]
    found: list[list[Candidate]] = [[] for _ in prompts]
    async with aclosing(what_is_told(exchange, model, prompts, tokens=True)) as told:
        async for place, news in told:
            if exchange.gone():
                raise ClientGone
            if isinstance(news, int):
                if text := growing[place].add(news):
                    yield lines.event(place, text, None, None)
                continue
            found[place] = news
            last = translation(writer, prompts[place], place, news[0], None)
            yield lines.event(place, growing[place].rest(last.text), None, last.finish_reason)
    spent = counted(exchange, model, prompts, found)
    if request.stream_options is not None and request.stream_options.include_usage:
        yield lines.usage(spent)
    yield b"data: [DONE]\n\n"


def writer_of(model: Model) -> Writer:
    assert model.writer is not None, "a translation has one"
    return model.writer


def counted(
    exchange: AsgiExchange, model: Model, prompts: Sequence[Prompt], found: Sequence[Sequence[Candidate]]
) -> CompletionUsage:
    """What a translation's request took, counted by the metrics, too; an engine counts its own."""
    spent = usage(sum(map(len, prompts)), sum(len(candidate.tokens) for row in found for candidate in row))
    metrics = exchange.metrics.generation.of(model.name, str(model.version))
    metrics.prompt_tokens += spent.prompt_tokens
    metrics.generation_tokens += spent.completion_tokens
    if exchange.caller is not None:
        exchange.caller.spend(spent.completion_tokens)
    return spent


@asgi("/v1/completions", copy_scope=False)
async def completions_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/completions", scope, receive, send, completions)


handlers = [completions_route]
