"""POST /v1/predict: numbers with their intervals, what each of several heads answers, or what an autoencoder makes of
an input."""

from __future__ import annotations

import base64
import time
from typing import Any

import msgspec
import numpy as np
from litestar import asgi
from litestar.types import Receive, Scope, Send

from export.processing.images import encode_png
from export.processing.inputs import ImageInput
from server.exchange import Exchange, Usage, encoder, handle
from server.head_answer import HeadAnswer, Range, head_answer, interval, sure, values
from server.routes.classify import DEFAULT_THRESHOLD, DEFAULT_TOP_K, Threshold, check_top_k
from server.rows import on_thread, read_request
from server.runtime.model import Model


class PredictRequest(msgspec.Struct):
    """top_k, threshold: for heads that answer classes and sets of labels, as in /v1/classify."""

    model: str
    input: msgspec.Raw
    top_k: int = DEFAULT_TOP_K
    threshold: Threshold = DEFAULT_THRESHOLD


class Predicted(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The answer for one input. What a model does not give is left out.

    Of a regression `values` by the names of the targets, and `interval` where it is known; of a model with several
    `heads` the answer of each; of an autoencoder the `reconstruction`, a vector or a PNG as a data URL, its `error`, by
    which what is unlike the training data is known (the model card has the errors of held-out items), and the code, as
    it is, in `embedding`. `uncertainty`: the deviation of the values that the networks of an ensemble answer.
    """

    index: int
    values: dict[str, float] | None = None
    interval: dict[str, Range] | None = None
    uncertainty: dict[str, float] | None = None
    heads: dict[str, HeadAnswer] | None = None
    reconstruction: list[float] | str | None = None
    error: float | None = None
    embedding: list[float] | None = None


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
    if model.manifest.task == "reconstruction" and isinstance(model.manifest.input, ImageInput):
        data = await on_thread(reconstructed, found)
    elif model.manifest.task == "reconstruction":
        data = reconstructed(found)
    else:
        data = [predicted(model, i, row, request) for i, row in enumerate(found)]
    body = encoder.encode(PredictAnswer(model.name, model.version, data, Usage(tokens, tokens)))
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


def predicted(model: Model, index: int, row: Any, request: PredictRequest) -> Predicted:
    """row: one of the answer "predict" (`server.runtime.answers`)."""
    manifest = model.manifest
    if manifest.task == "regression":
        found, apart = sure(row)
        return Predicted(
            index=index,
            values=values(manifest.labels, found),
            interval=interval(manifest.labels, found),
            uncertainty=None if apart is None else dict(zip(manifest.labels, apart.tolist(), strict=True)),
        )
    heads = {
        name: head_answer(head.task, head.labels, row[name], request.top_k, request.threshold)
        for name, head in manifest.heads.items()
    }
    return Predicted(index=index, heads=heads)


def reconstructed(rows: list[Any]) -> list[Predicted]:
    """rows: of an autoencoder's answer "predict", images or vectors."""
    return [
        Predicted(
            index=i,
            reconstruction=png_url(row["reconstruction"])
            if row["reconstruction"].dtype == np.uint8
            else row["reconstruction"].tolist(),
            error=float(row["error"]),
            embedding=row["embedding"].tolist(),
        )
        for i, row in enumerate(rows)
    ]


def png_url(pixels: np.ndarray) -> str:
    """An image, uint8 [height, width, 3], as it may stand in the `input` of a request, too."""
    return f"data:image/png;base64,{base64.b64encode(encode_png(pixels)).decode()}"


@asgi("/v1/predict", copy_scope=False)
async def predict_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/predict", scope, receive, send, predict)


handlers = [predict_route]
