"""A load generator of its own process: streamed completions over raw sockets, a connection a prompt, all sent at once.

    python -m benchmarks.generation.streams HOST PORT < bodies

Reads {"path", "bodies": [[JSON body, ...], ...]} from standard input: batches, one after the other. Prints
{"batches": [{"seconds", "streams": [{"first", "last", "text", "tokens"}]}]}. Times are seconds from when the request
was sent to the event that holds the first token and the last; events are parsed when all is over. tokens: what the
server says it generated, null where it does not say.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, cast

import uvloop


class Stream(asyncio.Protocol):
    """Sends one request, notes when what comes."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self.request, self.done = request, done
        self.pieces: list[tuple[float, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))
        if data.endswith(b"0\r\n\r\n"):
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.done.set_result(None)

    def found(self) -> dict[str, Any]:
        """When the events came that hold text, and what they say."""
        events = list(timed_events(self.pieces))
        told = [(when, event["choices"][0].get("text") or "") for when, event in events if event.get("choices")]
        texts = [when for when, text in told if text]
        if not texts:
            raise ValueError(f"no text came: {b''.join(data for _, data in self.pieces)[:500]!r}")
        usage = next((event["usage"] for _, event in reversed(events) if event.get("usage")), None)
        return {
            "first": texts[0] - self.sent,
            "last": texts[-1] - self.sent,
            "text": "".join(text for _, text in told),
            "tokens": usage and usage["completion_tokens"],
        }


def timed_events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The JSON of every server-sent event, and when its end came."""
    rest = b""
    for when, chunk in timed_chunks(pieces):
        *events, rest = re.split(rb"\r?\n\r?\n", rest + chunk)
        for event in events:
            if event.startswith(b"data: {"):
                yield when, json.loads(event[6:])


def timed_chunks(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The body's chunks of a chunked HTTP answer, and when each was whole. Raises ValueError for another status."""
    buffer, begun = b"", False
    for when, data in pieces:
        buffer += data
        if not begun:
            head, separator, body = buffer.partition(b"\r\n\r\n")
            begun = bool(separator)
            if begun and not head.startswith(b"HTTP/1.1 200"):
                raise ValueError(f"the server refuses: {buffer[:500]!r}")
            buffer = body if begun else buffer
        while begun:
            size, separator, body = buffer.partition(b"\r\n")
            if not separator or len(body) < int(size, 16) + 2:
                break
            yield when, body[: int(size, 16)]
            buffer = body[int(size, 16) + 2 :]


async def run(host: str, port: int, path: str, batches: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    loop, measured = asyncio.get_running_loop(), []
    for bodies in batches:
        streams = []
        for body in bodies:
            content = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            request = f"{head}content-length: {len(content)}\r\n\r\n".encode() + content
            streams.append(Stream(request, loop.create_future()))
            await loop.create_connection(lambda made=streams[-1]: made, host, port)  # type: ignore[misc]
        start = time.perf_counter()
        for stream in streams:
            stream.send()
        await asyncio.gather(*(stream.done for stream in streams))
        found = [stream.found() for stream in streams]
        end = max(stream.sent + one["last"] for stream, one in zip(streams, found, strict=True))
        measured.append({"seconds": end - start, "streams": found})
    return measured


if __name__ == "__main__":
    host, port = sys.argv[1:]
    asked = json.load(sys.stdin)
    json.dump({"batches": uvloop.run(run(host, int(port), asked["path"], asked["bodies"]))}, sys.stdout)
