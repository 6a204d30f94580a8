"""The Open Inference Protocol v2, as KServe and Triton speak it: /v2. Errors are {"error": "message"} here."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response, Router

from server.errors import ApiError, respond
from server.routes.v2 import health, infer, models, repository
from server.runtime.repository import CannotLoad, UnknownModel


def on_unknown_model(request: Request[Any, Any, Any], error: UnknownModel) -> Response[bytes]:
    return respond(request, ApiError(404, str(error)))


def on_cannot_load(request: Request[Any, Any, Any], error: CannotLoad) -> Response[bytes]:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return respond(request, ApiError(503, str(error), headers=headers))


handlers = [
    Router(
        path="/",
        route_handlers=[*health.handlers, *models.handlers, *repository.handlers, *infer.handlers],
        exception_handlers={UnknownModel: on_unknown_model, CannotLoad: on_cannot_load},
    )
]
