"""The head of a request to an inference route: what its request line and headers say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

from server.errors import ApiError
from server.runtime.batcher import PRIORITIES

Headers = Sequence[tuple[bytes, bytes]]


def session_of(headers: Headers) -> str | None:
    """What X-Session-ID says, of HTTP's headers or gRPC's metadata."""
    return next((value.decode("latin-1") for name, value in headers if name == b"x-session-id"), None)


class Head:
    """headers: names in lower case. kind: of the body, "application/json", without what follows a semicolon. timeout:
    seconds that the client gives the request, None where it does not say. priority: 0 is normal, higher goes first.
    length: of the body in bytes, None where it comes in chunks. options: what the fields of the address were made
    into, for whoever makes it; several requests may share a head.
    """

    __slots__ = (
        "_fields",
        "content_type",
        "headers",
        "kind",
        "length",
        "method",
        "options",
        "path",
        "priority",
        "query",
        "request_id",
        "timeout",
    )

    def __init__(self, method: str, path: str, query: bytes, headers: Headers, only: str = "POST") -> None:
        """Raises ApiError 405 for another method than `only`, 400 for a timeout or a priority that is none."""
        self.method, self.path, self.query, self.headers = method, path, query, headers
        self.content_type, self.request_id = "", b""
        self.timeout: float | None = None
        self.length: int | None = 0
        self.priority = 0
        self.options: Any = None
        self._fields: dict[str, str] | None = None
        if method != only:
            raise ApiError(405, f"{method} is not allowed here; use {only}", headers={"allow": only})
        for name, value in headers:
            if name == b"content-type":
                self.content_type = value.decode("latin-1")
            elif name == b"x-request-timeout":
                self.timeout = seconds_of(value)
            elif name == b"content-length":
                self.length = int(value) if value.isdigit() else None
            elif name == b"transfer-encoding":
                self.length = None
            elif name == b"x-request-priority":
                self.priority = priority_of(value)
            elif name == b"x-request-id":
                self.request_id = value
        self.kind = self.content_type.partition(";")[0].strip().lower()

    def fields(self) -> dict[str, str]:
        """Fields of the address: ?model=…&top_k=…"""
        if self._fields is None:
            parsed = parse_qs(self.query.decode("latin-1"))
            self._fields = {name: values[0] for name, values in parsed.items()}
        return self._fields


def seconds_of(value: bytes) -> float:
    """Raises ApiError 400."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise ApiError(400, "X-Request-Timeout: a positive number of seconds", param="X-Request-Timeout")
    return seconds


def priority_of(value: bytes) -> int:
    """Raises ApiError 400."""
    with suppress(ValueError):
        if (priority := int(value)) in PRIORITIES:
            return priority
    words = f"X-Request-Priority: a whole number from {PRIORITIES[0]} to {PRIORITIES[-1]}; 0 is normal, higher first"
    raise ApiError(400, words, param="X-Request-Priority")
