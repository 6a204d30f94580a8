"""Every error leaves the server as OpenAI's error object: {"error": {"message", "type", "param", "code"}}; under /v2 as
the Open Inference Protocol has it: {"error": "message"}.

Routes raise ApiError; what Litestar, msgspec or `export.processing` raise is turned into the same body here. What
nobody foresaw is a 500 that names the request's id; its traceback goes to the log and nowhere else.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import msgspec
from litestar import Request, Response
from litestar.exceptions import (
    HTTPException,
    MethodNotAllowedException,
    NotFoundException,
    SerializationException,
)
from litestar.types import ExceptionHandlersMap

from export.processing.inputs import BadInput

log = logging.getLogger("espalier.errors")


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`type` is the kind (invalid_request_error, rate_limit_error, server_error), `param` the field that is wrong,
    `code` a word for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


class ProtocolError(msgspec.Struct, frozen=True):
    """The body of every error under /v2."""

    error: str


class ApiError(Exception):
    """An error the client is told about: HTTP status, message, and OpenAI's fields. `type` follows from the status
    when it is not given; `headers` go into the response (Retry-After, Allow, ...)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(ErrorDetail(message=message, type=type or type_of(status), param=param, code=code))
        self.headers = headers or {}

    def encoded(self) -> bytes:
        """The response body, for handlers that write it themselves."""
        return msgspec.json.encode(self.body)


def speaks_protocol(path: str) -> bool:
    """Whether errors at this address are those of the Open Inference Protocol."""
    return path.startswith("/v2/") or path == "/v2"


def body_at(path: str, error: ApiError) -> bytes:
    """The body of an error at this address."""
    return msgspec.json.encode(ProtocolError(str(error))) if speaks_protocol(path) else error.encoded()


def type_of(status: int) -> str:
    """OpenAI's error type for an HTTP status."""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def request_id(scope: Any) -> str:
    """The id of the request in an ASGI scope; given out on first use where no RequestLog stands in front."""
    state: dict[str, Any] = scope.setdefault("state", {})
    found: str = state.setdefault("request_id", uuid4().hex)
    return found


def from_litestar(error: HTTPException, request: Request[Any, Any, Any]) -> ApiError:
    """Litestar's exception in our words; validation errors name their fields: "optimizer.momentum: Expected ..."."""
    status = error.status_code
    headers = {name: value for name, value in (error.headers or {}).items() if name.lower() != "content-type"}
    extra = error.extra if isinstance(error.extra, list) else []
    problems = [named(problem) for problem in extra if isinstance(problem, dict) and "message" in problem]
    if problems:
        field, _ = problems[0]
        words = [f"{name or 'the body'}: {message}" for name, message in problems]
        return ApiError(status, "; ".join(words), param=field, headers=headers)
    if isinstance(error, NotFoundException):
        return ApiError(status, f"there is nothing at {request.url.path}; /docs lists what there is", headers=headers)
    if isinstance(error, MethodNotAllowedException):
        allowed = headers.get("allow", "")
        return ApiError(status, f"{request.method} is not allowed at {request.url.path}; {allowed} is", headers=headers)
    if isinstance(error.__cause__, SerializationException):
        return ApiError(status, f"the body is not valid JSON: {error.detail}", headers=headers)
    return ApiError(status, error.detail or HTTPStatus(status).phrase, headers=headers)


def named(problem: dict[str, Any]) -> tuple[str | None, str]:
    """The field and the message of one of Litestar's validation errors; None for the body as a whole."""
    field, message = problem.get("key"), str(problem["message"])
    if field == "data":  # the handler's parameter, of which the client knows nothing
        return None, "is empty, JSON is expected" if message == "'data'" else message
    return field, message


def respond(request: Request[Any, Any, Any], error: ApiError) -> Response[bytes]:
    body = body_at(request.url.path, error)
    return Response(body, status_code=error.status, media_type="application/json", headers=error.headers)


def on_api_error(request: Request[Any, Any, Any], error: ApiError) -> Response[bytes]:
    return respond(request, error)


def on_bad_input(request: Request[Any, Any, Any], error: BadInput) -> Response[bytes]:
    return respond(request, ApiError(HTTPStatus.BAD_REQUEST, str(error)))


def on_recursion(request: Request[Any, Any, Any], error: RecursionError) -> Response[bytes]:
    return respond(request, ApiError(HTTPStatus.BAD_REQUEST, "the body is nested too deeply"))


def on_http_exception(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    if error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return on_unexpected(request, error)
    return respond(request, from_litestar(error, request))


def on_unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    identity = request_id(request.scope)
    log.error("%s %s failed, request %s", request.method, request.url.path, identity, exc_info=error)
    message = f"The server failed to answer; its log has the cause under request id {identity}."
    return respond(request, ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="internal_error"))


exception_handlers: ExceptionHandlersMap = {
    ApiError: on_api_error,
    BadInput: on_bad_input,
    RecursionError: on_recursion,
    HTTPException: on_http_exception,
    Exception: on_unexpected,
}
