"""Gives each request an id and logs those that were slow or failed; the others pass without a line."""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Iterable
from time import perf_counter

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("espalier.requests")

GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """ASGI application around another. Takes the client's X-Request-ID or makes one, and sends it back.

    A request is slow when its response starts later than `slow_seconds`: a long event stream is not.
    """

    def __init__(self, app: ASGIApp, slow_seconds: float) -> None:
        self.app = app
        self.slow_seconds = slow_seconds
        self._process = secrets.token_hex(4).encode()
        self._count = itertools.count(1)

    def identity(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """That of a request with these headers, names in lower case: the client's own, where it is one."""
        found = b""
        for name, value in headers:
            if name == b"x-request-id" and GIVEN_ID.fullmatch(value):
                found = value
        return found or b"%b-%x" % (self._process, next(self._count))

    def note(self, method: str, path: str, status: int, seconds: float, identity: bytes) -> None:
        """A response begins, so many seconds after the request."""
        if status >= 500 or seconds > self.slow_seconds:
            level = logging.ERROR if status >= 500 else logging.INFO
            words = "%s %s %d %.3f s, request %s"
            log.log(level, words, method, path, status, seconds, identity.decode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        identity = self.identity(scope["headers"])
        scope.setdefault("state", {})["request_id"] = identity.decode()
        started = perf_counter()

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", identity)]
                self.note(scope["method"], scope["path"], message["status"], perf_counter() - started, identity)
            await send(message)

        await self.app(scope, receive, with_id)
