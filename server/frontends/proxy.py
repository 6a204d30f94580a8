"""What a front-end does not answer itself goes to the inference process as it is, and its answer comes back as it is,
both as they arrive: bodies are streamed, and a client that leaves ends the request there, too.

Each request has a connection of its own to the other's Unix socket, which nobody else can reach, so the inference
process believes who the client is (`BehindProxy`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import cast

import httptools
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from server.errors import ApiError

log = logging.getLogger("espalier.frontends")

READ_BYTES = 256 * 1024
CLIENT = b"x-espalier-client"
# Between two hops only (RFC 9110, 7.6.1), or answered by the front-end, or ours.
NOT_SENT = {
    *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    *(b"expect", CLIENT),
}
NOT_RETURNED = {b"connection", b"keep-alive", b"transfer-encoding", b"date"}


class Proxy:
    """ASGI application. socket: path of the inference process's."""

    def __init__(self, socket: str) -> None:
        self.socket = socket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = cast(HTTPScope, scope)
        try:
            reader, writer = await asyncio.open_unix_connection(self.socket, limit=READ_BYTES)
        except OSError:
            await unavailable(send)
            return
        chunked = any(name == b"transfer-encoding" for name, _ in request["headers"])
        writer.write(head(request, chunked))
        up = asyncio.create_task(upload(receive, writer, chunked))
        down = asyncio.create_task(download(reader, send, request["method"] == "HEAD"))
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            if down.done() or await up:
                await down
        finally:
            for task in (up, down):
                task.cancel()
            writer.transport.abort()
            await asyncio.gather(up, down, return_exceptions=True)


def head(scope: HTTPScope, chunked: bool) -> bytes:
    """The request line and the headers."""
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    lines = [b"%s %s HTTP/1.1" % (scope["method"].encode(), target)]
    lines += [b"%s: %s" % (name, value) for name, value in scope["headers"] if name not in NOT_SENT]
    lines.append(b"connection: close")
    if chunked:
        lines.append(b"transfer-encoding: chunked")
    if scope["client"] is not None:
        host, port = scope["client"]
        lines.append(b"%s: %s %d" % (CLIENT, host.encode(), port))
    return b"\r\n".join(lines) + b"\r\n\r\n"


async def upload(receive: Receive, writer: asyncio.StreamWriter, chunked: bool) -> bool:
    """Send the body, then wait until the client has gone. Returns True where the inference process takes no more of it
    before that: it has answered."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        body = cast(bytes, message.get("body", b""))
        if chunked and body:
            body = b"%x\r\n%s\r\n" % (len(body), body)
        if chunked and not message.get("more_body"):
            body += b"0\r\n\r\n"
        try:
            writer.write(body)
            await writer.drain()
        except ConnectionError:
            return True


async def download(reader: asyncio.StreamReader, send: Send, is_head: bool) -> None:
    """Pass the answer on. One that breaks off is broken off here; where none comes at all, the client gets a 503."""
    answer = Answer(is_head)
    parser = httptools.HttpResponseParser(answer)
    with suppress(ConnectionError):
        while not answer.complete and (content := await reader.read(READ_BYTES)):
            parser.feed_data(content)
            await answer.pass_on(parser, send)
    if not answer.started:
        await unavailable(send)


class Answer:
    """What httptools makes of the bytes, until it is passed on."""

    def __init__(self, is_head: bool) -> None:
        self.is_head = is_head
        self.headers: list[tuple[bytes, bytes]] = []
        self.body: list[bytes] = []
        self.ready = self.started = self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if (lower := name.lower()) not in NOT_RETURNED:
            self.headers.append((lower, value))

    def on_headers_complete(self) -> None:
        self.ready = True
        self.complete = self.is_head

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.complete = True

    async def pass_on(self, parser: httptools.HttpResponseParser, send: Send) -> None:
        if not self.ready:
            return
        if not self.started:
            self.started = True
            status = parser.get_status_code()
            await send({"type": "http.response.start", "status": status, "headers": self.headers})
        if self.body or self.complete:
            body = b"".join(self.body)
            self.body.clear()
            await send({"type": "http.response.body", "body": body, "more_body": not self.complete})


async def unavailable(send: Send) -> None:
    body = lost().encoded()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def lost() -> ApiError:
    """What clients are told once the inference process is not there."""
    return ApiError(503, "the inference process has stopped; the server is going down", code="unavailable")


class BehindProxy:
    """ASGI application around that of the inference process: the client is who the front-end says, and what a request
    has changed is known to all front-ends before it is answered."""

    def __init__(self, app: ASGIApp, behind: Callable[[], bool], settled: Callable[[], Awaitable[None]]) -> None:
        """behind: whether a front-end does not know yet what is served, and to whom; settled: until all do."""
        self.app, self.behind, self.settled = app, behind, settled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        headers = list(scope["headers"])
        for place, (name, value) in enumerate(headers):
            if name == CLIENT:
                host, _, port = value.decode().partition(" ")
                scope["client"] = host, int(port)
                del headers[place]
                scope["headers"] = headers
                break

        async def settled(message: Message) -> None:
            if message["type"] == "http.response.start" and self.behind():
                await self.settled()
            await send(message)

        await self.app(scope, receive, settled)
