"""Gives each request an id and logs those that were slow or failed; the others pass without a line."""

from __future__ import annotations

import itertools
import logging
import re
import secrets
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
        self._process = secrets.token_hex(4)
        self._count = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        identity = b""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and GIVEN_ID.fullmatch(value):
                identity = value
        identity = identity or f"{self._process}-{next(self._count):x}".encode()
        scope.setdefault("state", {})["request_id"] = identity.decode()
        started = perf_counter()

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", identity)]
                status, seconds = message["status"], perf_counter() - started
                if status >= 500 or seconds > self.slow_seconds:
                    level = logging.ERROR if status >= 500 else logging.INFO
                    words = "%s %s %d %.3f s, request %s"
                    log.log(level, words, scope["method"], scope["path"], status, seconds, identity.decode())
            await send(message)

        await self.app(scope, receive, with_id)
