"""The routes that the hot lane answers, by their paths. Each is mounted as an ASGI handler, too, and answers alike."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from server.exchange import Body, Exchange
from server.routes.classify import classify
from server.routes.embeddings import embeddings
from server.routes.health import LIVE
from server.routes.predict import predict
from server.routes.v2.infer import infer


@dataclass(frozen=True, slots=True)
class HotRoute:
    """name: in logs and metrics. answer: awaits futures, and what needs a task of its own in one that it makes; what it
    gives is no stream of events. Or, instead of that, JSON that is always the answer."""

    name: str
    answer: Callable[[Exchange], Coroutine[Any, Any, Body]] | bytes
    method: str = "POST"


BY_PATH = {
    route.name: route
    for route in (
        HotRoute("/health/live", msgspec.json.encode(LIVE), "GET"),
        HotRoute("/v1/classify", classify),
        HotRoute("/v1/embeddings", embeddings),
        HotRoute("/v1/predict", predict),
    )
}


INFER = HotRoute("/v2/infer", infer)


def hot_route(path: str) -> HotRoute | None:
    if path.endswith("/infer"):
        match path.split("/"):
            case ["", "v2", "models", model, "infer"] if model:
                return INFER
            case ["", "v2", "models", model, "versions", version, "infer"] if model and version:
                return INFER
    return BY_PATH.get(path)
