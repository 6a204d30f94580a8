"""How a call ends that goes wrong: gRPC's status codes for what HTTP has statuses for."""

from __future__ import annotations

import logging
from typing import NamedTuple

import grpc

from export.processing.inputs import BadInput
from server.errors import ApiError
from server.runtime.batcher import DeadlinePassed, RunFailed
from server.runtime.repository import CannotLoad, UnknownModel

log = logging.getLogger("espalier.grpc")

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class Failure(NamedTuple):
    """trailing: metadata, such as retry-after in seconds."""

    code: grpc.StatusCode
    message: str
    trailing: tuple[tuple[str, str], ...] = ()


def failure(error: Exception, method: str) -> Failure:
    """What the client is told. What nobody foresaw goes to the log with its traceback, and the client learns no more
    than that."""
    match error:
        case ApiError():
            code = CODES.get(error.status, grpc.StatusCode.INTERNAL)
            return Failure(code, str(error), tuple((name.lower(), value) for name, value in error.headers.items()))
        case BadInput():
            return Failure(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        case UnknownModel():
            return Failure(grpc.StatusCode.NOT_FOUND, str(error))
        case CannotLoad(retry_after=seconds):
            return Failure(grpc.StatusCode.UNAVAILABLE, str(error), _retry(seconds))
        case DeadlinePassed() | TimeoutError():
            return Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "the request waited until its deadline and was dropped")
    log.error("%s failed", method, exc_info=error)
    what = "the model failed to run" if isinstance(error, RunFailed) else "the server failed to answer"
    return Failure(grpc.StatusCode.INTERNAL, f"{what}; the server's log has the cause")


def _retry(seconds: int | None) -> tuple[tuple[str, str], ...]:
    return () if seconds is None else (("retry-after", str(seconds)),)
