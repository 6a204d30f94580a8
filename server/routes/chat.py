"""POST /v1/chat/completions: OpenAI's, of language models that know chats."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import msgspec
from litestar import asgi
from litestar.types import Receive, Scope, Send

from server.chat_completion import ChatCompletion, ChatLogProbabilities, chat_log_probabilities, choice
from server.chats import ChatRequest, order_of
from server.completion import usage
from server.event_lines import EventLines
from server.exchange import AsgiExchange, decode_json, encoder, handle
from server.generating import Asked, Told, answers, events, language_of
from server.rows import on_thread
from server.runtime.model import Model

decoder = msgspec.json.Decoder(ChatRequest)


async def chat(exchange: AsgiExchange) -> bytes | AsyncGenerator[bytes, None]:
    """ChatCompletion as JSON, or the events of a stream."""
    request: ChatRequest = decode_json(await exchange.body(), decoder)
    model = await exchange.find(request.model, "chat")
    language = language_of(model)
    asked = await on_thread(order_of, request, language)
    answer = ChatCompletion(
        id=f"chatcmpl-{exchange.request_id}",
        created=int(time.time()),
        model=model.name,
        system_fingerprint=model.fingerprint,
    )
    if request.stream:
        return stream(exchange, model, request, asked, answer)
    [found] = await answers(exchange, model, [asked])
    start = time.perf_counter()
    answer.choices = [
        choice(language.texts, candidate, index, asked.sampling.stop, logprobs=bool(request.logprobs))
        for index, candidate in enumerate(found)
    ]
    answer.usage = usage(len(asked.tokens), sum(len(candidate.tokens) for candidate in found))
    body = encoder.encode(answer)
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


def stream(
    exchange: AsgiExchange, model: Model, request: ChatRequest, asked: Asked, answer: ChatCompletion
) -> AsyncGenerator[bytes, None]:
    texts = language_of(model).texts
    answer.object = "chat.completion.chunk"

    def note(tokens: list[Told]) -> ChatLogProbabilities:
        return chat_log_probabilities(texts, tokens)

    wanted = request.stream_options is not None and request.stream_options.include_usage
    return events(
        exchange,
        model,
        [asked],
        EventLines(answer, b'"delta":{"content":', b"}", b'"delta":{"role":"assistant","content":"","refusal":null}'),
        note if request.logprobs else None,
        (lambda written: usage(len(asked.tokens), written)) if wanted else None,
    )


@asgi("/v1/chat/completions", copy_scope=False)
async def chat_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/chat/completions", scope, receive, send, chat)


handlers = [chat_route]
