"""Gives each request an id and logs those that were slow or failed; the others pass without a line.

Requests to models tell their traces themselves, the others are traced here.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from server import logs
from server.access import Caller
from server.traces import Answered, Traces

log = logging.getLogger("espalier.requests")

GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# Asked every few seconds by machines, and of no interest to anybody.
UNTRACED = ("/health/", "/v2/health/", "/metrics")


class RequestLog:
    """ASGI application around another. Takes the client's X-Request-ID or makes one, and sends it back.

    A request is slow when its response starts later than `slow_seconds`: a long event stream is not.
    """

    def __init__(self, app: ASGIApp, slow_seconds: float, traces: Traces | None = None) -> None:
        self.app, self.traces = app, traces
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
        state = scope.setdefault("state", {})
        state["request_id"] = identity.decode()
        logs.request.set(state)
        started = perf_counter()
        answered = 0

        async def with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", identity)]
                answered, seconds = message["status"], perf_counter() - started
                note(scope["method"], scope["path"], answered, seconds, self.slow_seconds, state)
            await send(message)

        await self.app(scope, receive, with_id)
        if self.traces is not None and answered and not state.get("traced"):
            trace(self.traces, scope, answered, started)


def note(method: str, path: str, status: int, seconds: float, slow_seconds: float, request: Mapping[str, Any]) -> None:
    """Log a request that failed or whose answer began late. request: what `logs.told` takes."""
    if status >= 500 or seconds > slow_seconds:
        level = logging.ERROR if status >= 500 else logging.INFO
        about = {"method": method, "path": path, "status": status, "seconds": round(seconds, 6)}
        words, identity = "%s %s %d %.3f s, request %s", request["request_id"]
        log.log(level, words, method, path, status, seconds, identity, extra={"about": about, "request": request})


def trace(traces: Traces, scope: HTTPScope, status: int, started: float) -> None:
    """Trace a request that no model was asked by. started: on time.perf_counter's clock."""
    if scope["path"].startswith(UNTRACED) or (origin := traces.origin(scope["headers"])) is None:
        return
    route: str = scope.get("path_template") or "unknown"  # where the router found none
    caller: Caller | None = scope["state"].get("caller")
    key = None if caller is None else caller.id
    identity = scope["state"]["request_id"]
    traces.add(Answered(origin, scope["method"], route, status, started, perf_counter(), identity, key))
