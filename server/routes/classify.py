"""POST /v1/classify: a class, or the set of labels, of texts, images or vectors."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from litestar import asgi
from litestar.types import Receive, Scope, Send

from export.processing.answers import Prediction, label_set, top_k
from server.errors import ApiError
from server.exchange import Exchange, Usage, encoder, handle
from server.head_answer import sure
from server.rows import read_request

DEFAULT_TOP_K = 5
DEFAULT_THRESHOLD = 0.5

Threshold = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class ClassifyRequest(msgspec.Struct):
    """threshold: the least probability of a label that is in the set, for a model that answers sets of labels."""

    model: str
    input: msgspec.Raw
    top_k: int = DEFAULT_TOP_K
    threshold: Threshold = DEFAULT_THRESHOLD


class Classified(msgspec.Struct, omit_defaults=True):
    """The answer for one input. Of one among several classes: the winning `label`, its probability, and the `top_k`
    best of all. Of a set of labels: those at or over the threshold, and the `probabilities` of all. `uncertainty`: how
    far the networks of an ensemble are apart, in nats: 0 where they agree."""

    index: int
    label: str | None = None
    probability: float | None = None
    top: list[Prediction] | None = None
    labels: list[str] | None = None
    probabilities: dict[str, float] | None = None
    uncertainty: float | None = None


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
    check_top_k(request.top_k)
    found = await exchange.answers(model, rows, "classify")
    start = time.perf_counter()
    labels = model.manifest.labels
    data = []
    several = model.manifest.task == "multi_label"
    for i, row in enumerate(found):
        probabilities, apart = sure(row)
        uncertainty = None if apart is None else float(apart)
        if several:
            all_of_them = dict(zip(labels, probabilities.tolist(), strict=True))
            chosen = label_set(probabilities, labels, request.threshold)
            data.append(Classified(i, labels=chosen, probabilities=all_of_them, uncertainty=uncertainty))
        else:
            best = top_k(probabilities, labels, request.top_k)
            data.append(Classified(i, best[0].label, best[0].probability, best, uncertainty=uncertainty))
    body = encoder.encode(ClassifyAnswer(model.name, model.version, data, Usage(tokens, tokens)))
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


def check_top_k(top_k: int) -> None:
    """Raises ApiError."""
    if top_k < 1:
        raise ApiError(400, f"top_k is {top_k}; it must be 1 or more", param="top_k")


@asgi("/v1/classify", copy_scope=False)
async def classify_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/classify", scope, receive, send, classify)


handlers = [classify_route]
