"""POST /v1/classify: a class, or the set of labels, of texts, images or vectors."""

from __future__ import annotations

import time

import msgspec
from litestar import asgi
from litestar.types import Receive, Scope, Send

from export.processing.answers import Prediction, top_k
from server.errors import ApiError
from server.exchange import Exchange, Usage, encoder, handle
from server.rows import read_request

DEFAULT_TOP_K = 5


class ClassifyRequest(msgspec.Struct):
    model: str
    input: msgspec.Raw
    top_k: int = DEFAULT_TOP_K


class Classified(msgspec.Struct):
    """The answer for one input: the winning label, its probability, and the `top_k` best of all."""

    index: int
    label: str
    probability: float
    top: list[Prediction]


class ClassifyAnswer(msgspec.Struct):
    """`data` has one entry an input, in their order."""

    model: str
    version: int
    data: list[Classified]
    usage: Usage
    object: str = "list"


decoder = msgspec.json.Decoder(ClassifyRequest)


async def classify(exchange: Exchange) -> bytes:
    """ClassifyAnswer as JSON."""
    model, (rows, tokens), request = await read_request(exchange, decoder, "classify")
    if request.top_k < 1:
        raise ApiError(400, f"top_k is {request.top_k}; it must be 1 or more", param="top_k")
    found = await exchange.answers(model, rows, "classify")
    start = time.perf_counter()
    labels = model.manifest.labels
    data = []
    for i, probabilities in enumerate(found):
        best = top_k(probabilities, labels, request.top_k)
        data.append(Classified(i, best[0].label, best[0].probability, best))
    body = encoder.encode(ClassifyAnswer(model.name, model.version, data, Usage(tokens, tokens)))
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


@asgi("/v1/classify", copy_scope=False)
async def classify_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/classify", scope, receive, send, classify)


handlers = [classify_route]
