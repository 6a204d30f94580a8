"""Gives each request an id and logs those that were slow or failed; the others pass without a line.

Requests to models tell their traces themselves, the others are traced here.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Iterable
from time import perf_counter

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from server import logs
from server.access import Caller
from server.exchange import Exchange, about
from server.traces import Answered, Traces

log = logging.getLogger("espalier.requests")

GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# Asked every few seconds by machines, and of no interest to anybody.
UNTRACED = ("/health/", "/v2/health/", "/metrics")


class RequestLog:
    """ASGI application around another. Takes the client's X-Request-ID or makes one, and sends it back.

    A request is slow when its response starts later than `slow_seconds`: a long event stream is not.
    """

    def __init__(self, app: ASGIApp, slow_seconds: float, traces: Traces | None) -> None:
        self.app, self.traces = app, traces
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

    def note(
        self,
        method: str,
        path: str,
        status: int,
        seconds: float,
        identity: bytes,
        exchange: Exchange | None = None,
    ) -> None:
        """A response begins, so many seconds after the request. exchange: where no context says which request it is."""
        if status >= 500 or seconds > self.slow_seconds:
            level = logging.ERROR if status >= 500 else logging.INFO
            words = "%s %s %d %.3f s, request %s"
            told = {"method": method, "path": path, "status": status, "seconds": round(seconds, 6)}
            extra = {"about": told, "request": None if exchange is None else about(exchange)}
            log.log(level, words, method, path, status, seconds, identity.decode(), extra=extra)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        identity = self.identity(scope["headers"])
        state = scope.setdefault("state", {})
        state["request_id"] = identity.decode()
        logs.request.set(state)
        started = perf_counter()
        status = 0

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity)]
                self.note(scope["method"], scope["path"], status, perf_counter() - started, identity)
            await send(message)

        await self.app(scope, receive, with_id)
        if self.traces is not None and status and not state.get("traced"):
            trace(self.traces, scope, status, started)


def trace(traces: Traces, scope: HTTPScope, status: int, started: float) -> None:
    """Trace a request that no model was asked by. started: on time.perf_counter's clock."""
    if scope["path"].startswith(UNTRACED) or (origin := traces.origin(scope["headers"])) is None:
        return
    route: str = scope.get("path_template") or "unknown"  # where the router found none
    caller: Caller | None = scope["state"].get("caller")
    key = None if caller is None else caller.id
    identity = scope["state"]["request_id"]
    traces.add(Answered(origin, scope["method"], route, status, started, perf_counter(), identity, key))
