"""An open-loop load generator of its own process: requests leave when they are due, answered or not.

    python -m benchmarks.open_load HOST PORT REQUESTS_PER_SECOND SECONDS < request

Arrivals are random (Poisson). A request takes a connection that is free, or opens another. Reads one whole request
(head and body) from standard input, prints {"seconds", "answers": [[status, seconds from the first byte sent to the
last received, when it was sent]], "unanswered", "connections", "latest"} as JSON; latest: how far behind its schedule a
request was sent at worst, in seconds: where that is long, this process had too little of a core.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import cast

import uvloop

# After the last request, answers are waited for so long.
PATIENCE_SECONDS = 10.0
# A connection beyond these is not opened; the request counts as unanswered.
MOST_CONNECTIONS = 4096


class Connection(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self.load = load
        self.sent = 0.0
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        if len(body) < int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]):
            return
        self.load.answered(int(head[9:12]), self.sent)
        self.sent, self.buffer = 0.0, b""
        self.load.free.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.load.connections -= 1
        if self in self.load.free:
            self.load.free.remove(self)
        elif self.sent:
            self.load.answered(0, self.sent)


class Load:
    """The connections of one load, and what they were answered: status (0: the connection broke), seconds, and when it
    was sent."""

    def __init__(self, host: str, port: int, request: bytes) -> None:
        self.host, self.port, self.request = host, port, request
        self.free: list[Connection] = []
        self.answers: list[tuple[int, float, float]] = []
        self.start = 0.0
        self.connections = self.most = self.sent = 0
        self.opening: set[asyncio.Task[None]] = set()

    def answered(self, status: int, sent: float) -> None:
        self.answers.append((status, time.perf_counter() - sent, sent - self.start))

    def send(self) -> None:
        self.sent += 1
        if self.free:
            self.free.pop().send()
        elif self.connections < MOST_CONNECTIONS:
            self.connections += 1
            self.most = max(self.most, self.connections)
            task = asyncio.create_task(self.open())
            self.opening.add(task)
            task.add_done_callback(self.opening.discard)

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: Connection(self), self.host, self.port)
        except OSError:
            self.connections -= 1
            return
        connection.send()

    async def run(self, rate: float, seconds: float) -> dict[str, object]:
        arrivals = random.Random(0)
        self.start = start = due = time.perf_counter()
        latest = 0.0
        while due < start + seconds:
            now = time.perf_counter()
            if due > now:
                await asyncio.sleep(due - now)
            latest = max(latest, time.perf_counter() - due)
            self.send()
            due += arrivals.expovariate(rate)
        spent = time.perf_counter() - start
        while len(self.answers) < self.sent and time.perf_counter() < start + spent + PATIENCE_SECONDS:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return {
            "seconds": spent,
            "answers": self.answers,
            "unanswered": self.sent - len(self.answers),
            "connections": self.most,
            "latest": latest,
        }


if __name__ == "__main__":
    host, port, rate, seconds = sys.argv[1:]
    load = Load(host, int(port), sys.stdin.buffer.read())
    json.dump(uvloop.run(load.run(float(rate), float(seconds))), sys.stdout)
