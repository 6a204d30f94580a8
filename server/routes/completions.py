"""POST /v1/completions: OpenAI's. A language model goes on with the prompt, a translation model translates it.

With stream=true every piece of text is sent as soon as it is certain, as server-sent events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
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
from server.runtime.search import Candidate, Listener
from server.runtime.writer import Writer

decoder = msgspec.json.Decoder(CompletionRequest)


async def completions(exchange: Exchange) -> bytes | AsyncIterator[bytes]:
    """Completion as JSON, or the events of a stream."""
    request: CompletionRequest = decode_json(await exchange.body(), decoder)
    model = exchange.find(request.model, "complete")
    prompts = await on_thread(prompts_of, request, model)
    writer = model.writer
    assert writer is not None, "a model that completes has one"
    answer = Completion(f"cmpl-{request_id(exchange.scope)}", int(time.time()), model.name)
    if request.stream:
        return await streamed(exchange, model, writer, request, prompts, answer)
    found = await exchange.answers(model, prompts, "complete")
    start = time.perf_counter()
    answer.choices = [
        choice(writer, prompt, place * prompt.options.n + i, candidate, request.logprobs)
        for place, (prompt, candidates) in enumerate(zip(prompts, found, strict=True))
        for i, candidate in enumerate(candidates)
    ]
    answer.usage = usage(exchange, model, prompts, found)
    body = encoder.encode(answer)
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


async def streamed(
    exchange: Exchange,
    model: Model,
    writer: Writer,
    request: CompletionRequest,
    prompts: list[Prompt],
    answer: Completion,
) -> AsyncIterator[bytes]:
    """The events of a stream, once there is a first token: until then errors are raised as for any request."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
    wanted = True

    def listener(place: int) -> Listener:
        def hear(token: int, _: float) -> bool:
            loop.call_soon_threadsafe(heard.put_nowait, (place, token))
            return wanted

        return hear

    asked = [replace(prompt, listener=listener(place)) for place, prompt in enumerate(prompts)]
    ticket = exchange.submit(model, asked, "complete")
    ticket.future.add_done_callback(lambda _: heard.put_nowait(None))
    first = await heard.get()
    if first is None:
        await exchange.result(ticket)

    async def events() -> AsyncIterator[bytes]:
        nonlocal wanted
        growing = [GrowingText(writer.target.tokenizer, prompt.options.stop) for prompt in prompts]
        event = first
        try:
            while event is not None:
                if exchange.gone():
                    raise ClientGone
                place, token = event
                if text := growing[place].add(token):
                    yield sent(answer, CompletionChoice(text, place))
                event = await heard.get()
            found = await ticket.future
            for place, (candidate,) in enumerate(found):
                last = choice(writer, prompts[place], place, candidate, None)
                last.text = growing[place].rest(last.text)
                yield sent(answer, last)
            answer.usage = usage(exchange, model, prompts, found)
            if request.stream_options is not None and request.stream_options.include_usage:
                yield sent(answer)
            yield b"data: [DONE]\n\n"
        finally:
            wanted = False

    return events()


def sent(answer: Completion, *choices: CompletionChoice) -> bytes:
    """One event of a stream."""
    answer.choices = list(choices)
    return b"data: " + encoder.encode(answer) + b"\n\n"


def usage(
    exchange: Exchange, model: Model, prompts: Sequence[Prompt], found: Sequence[Sequence[Candidate]]
) -> CompletionUsage:
    """Of a request, counted by the metrics, too."""
    read = sum(map(len, prompts))
    written = sum(len(candidate.tokens) for candidates in found for candidate in candidates)
    exchange.metrics.tokens[model.name, str(model.version), "read"] += read
    exchange.metrics.tokens[model.name, str(model.version), "written"] += written
    return CompletionUsage(read, written, read + written)


@asgi("/v1/completions", copy_scope=False)
async def completions_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/completions", scope, receive, send, completions)


handlers = [completions_route]
