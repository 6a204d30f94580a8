"""POST /v1/predict: numbers with their intervals, or what each of several heads answers."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from litestar import asgi
from litestar.types import Receive, Scope, Send

from server.exchange import Exchange, Usage, encoder, handle
from server.head_answer import HeadAnswer, Range, head_answer, interval, values
from server.routes.classify import DEFAULT_THRESHOLD, DEFAULT_TOP_K, Threshold, check_top_k
from server.rows import read_request
from server.runtime.model import Model


class PredictRequest(msgspec.Struct):
    """top_k, threshold: for heads that answer classes and sets of labels, as in /v1/classify."""

    model: str
    input: msgspec.Raw
    top_k: int = DEFAULT_TOP_K
    threshold: Threshold = DEFAULT_THRESHOLD


class Predicted(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The answer for one input. Of a regression `values` by the names of the targets, and `interval` where it is
    known; of a model with several `heads` the answer of each. What a model does not give is left out."""

    index: int
    values: dict[str, float] | None = None
    interval: dict[str, Range] | None = None
    heads: dict[str, HeadAnswer] | None = None


class PredictAnswer(msgspec.Struct):
    """`data` has one entry an input, in their order."""

    model: str
    version: int
    data: list[Predicted]
    usage: Usage
    object: str = "list"


decoder = msgspec.json.Decoder(PredictRequest)


async def predict(exchange: Exchange) -> bytes:
    """PredictAnswer as JSON."""
    model, (rows, tokens), request = await read_request(exchange, decoder, "predict")
    check_top_k(request.top_k)
    found = await exchange.answers(model, rows, "predict")
    start = time.perf_counter()
    data = [predicted(model, i, row, request) for i, row in enumerate(found)]
    body = encoder.encode(PredictAnswer(model.name, model.version, data, Usage(tokens, tokens)))
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


def predicted(model: Model, index: int, row: Any, request: PredictRequest) -> Predicted:
    """row: one of the answer "predict" (`server.runtime.answers`)."""
    manifest = model.manifest
    if manifest.task == "regression":
        return Predicted(index=index, values=values(manifest.labels, row), interval=interval(manifest.labels, row))
    heads = {
        name: head_answer(head.task, head.labels, row[name], request.top_k, request.threshold)
        for name, head in manifest.heads.items()
    }
    return Predicted(index=index, heads=heads)


@asgi("/v1/predict", copy_scope=False)
async def predict_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/predict", scope, receive, send, predict)


handlers = [predict_route]
