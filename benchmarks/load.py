"""A load generator of its own process: HTTP/1.1 over raw sockets, one request at a time on each connection.

    python -m benchmarks.load HOST PORT CONCURRENCY SECONDS < request

Reads one whole request (head and body) from standard input, prints {"seconds", "latencies", "errors"} as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import cast

import uvloop


class Connection(asyncio.Protocol):
    """Sends the request, waits for the whole answer, sends it again, until the time is over."""

    def __init__(self, request: bytes, until: float, done: asyncio.Future[None]) -> None:
        self.request, self.until, self.done = request, until, done
        self.latencies: list[float] = []
        self.errors = 0
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.send()

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        now = time.perf_counter()
        self.latencies.append(now - self.sent)
        self.errors += not head.startswith(b"HTTP/1.1 200")
        self.buffer = b""
        if now < self.until:
            self.send()
        else:
            self.transport.close()
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.errors += 1
            self.done.set_result(None)


async def load(host: str, port: int, concurrency: int, seconds: float, request: bytes) -> dict[str, object]:
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    connections = [Connection(request, start + seconds, loop.create_future()) for _ in range(concurrency)]
    for connection in connections:
        await loop.create_connection(lambda c=connection: c, host, port)  # type: ignore[misc]
    await asyncio.gather(*(connection.done for connection in connections))
    return {
        "seconds": time.perf_counter() - start,
        "latencies": [latency for connection in connections for latency in connection.latencies],
        "errors": sum(connection.errors for connection in connections),
    }


if __name__ == "__main__":
    host, port, concurrency, seconds = sys.argv[1:]
    found = uvloop.run(load(host, int(port), int(concurrency), float(seconds), sys.stdin.buffer.read()))
    json.dump(found, sys.stdout)
