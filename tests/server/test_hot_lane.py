"""The short way of inference through the server, spoken to byte by byte over real sockets."""

from __future__ import annotations

import json
import logging
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.runtime.batcher import Block, Value, Wanted
from server.settings import Settings
from tests.server.bundles import publish_greys, publish_images, publish_sums, publish_texts, publish_vectors
from tests.server.conftest import Live, Start, running

LIMIT = 200_000


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    raw: bytes = field(repr=False)

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A connection that sends what it is told, and reads responses one by one."""

    def __init__(self, live: Live) -> None:
        host, port = live.address.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.read = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> Wire:
        self.socket.sendall(b"".join(parts))
        return self

    def more(self) -> None:
        part = self.socket.recv(65536)
        assert part, f"the server hung up; before that came {self.read!r}"
        self.read += part

    def answer(self, *, head_only: bool = False) -> Answer:
        while b"\r\n\r\n" not in self.read:
            self.more()
        head, _, self.read = self.read.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        length = 0 if head_only else int(headers.get("content-length", "0"))
        while len(self.read) < length:
            self.more()
        body, self.read = self.read[:length], self.read[length:]
        return Answer(int(lines[0].split()[1]), headers, body, head + b"\r\n\r\n" + body)

    def closed(self) -> bool:
        """Whether the server hangs up, and sends nothing before it does."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


def post(path: str, body: bytes, *headers: str, kind: str = "application/json", version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: x", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def points(*numbers: float, **more: object) -> bytes:
    return json.dumps({"model": "points", "input": numbers, **more}).encode()


def chunked(path: str, pieces: Sequence[bytes]) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


ABOVE, BELOW = post("/v1/classify", points(0, 3)), post("/v1/classify", points(0, -3))
BINARY = post("/v1/classify?model=points&top_k=1", np.float32([0, -1, 0, 1]).tobytes(), kind="application/octet-stream")
INFER = json.dumps({"inputs": [{"name": "vector", "shape": [1, 2], "datatype": "FP32", "data": [0, 3]}]}).encode()


def labels(answer: Answer) -> list[str]:
    assert answer.status == 200, answer
    return [one["label"] for one in answer.json()["data"]]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False, max_body_bytes=LIMIT)
    for publish in (publish_vectors, publish_images, publish_texts, publish_sums, publish_greys):
        publish(settings.repository)
    with running(settings) as server:
        yield server


@pytest.fixture(scope="module")
def plain(live: Live) -> Iterator[Live]:
    """A server of the same models that has uvicorn's own protocol: hot routes are reached through ASGI."""
    settings = Settings(
        home=live.settings.home / "plain",
        repository=live.settings.repository,
        port=0,
        worker=False,
        max_body_bytes=LIMIT,
    )

    def no_lane(*arguments: Any, lane: object, **more: Any) -> HttpToolsProtocol:
        return HttpToolsProtocol(*arguments, **more)

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.serve.HotLane", no_lane)
            server = stack.enter_context(running(settings))
        yield server


def test_a_connection_is_kept_and_a_head_that_came_before_is_known(live: Live) -> None:
    with Wire(live) as wire:
        for _ in range(3):
            assert labels(wire.send(ABOVE).answer()) == ["above"]
            assert labels(wire.send(BELOW).answer()) == ["below"]
            assert labels(wire.send(BINARY).answer()) == ["below", "above"]
            assert wire.send(post("/v1/classify", b"{}")).answer().status == 400


def test_the_last_answer_of_a_connection_says_so(live: Live) -> None:
    for _ in range(2):
        with Wire(live) as wire:
            wire.send(ABOVE)
            assert "connection" not in wire.answer().headers
            answer = wire.send(post("/v1/classify", points(0, 3), "Connection: close")).answer()
            assert labels(answer) == ["above"]
            assert answer.headers["connection"] == "close"
            assert wire.closed()


def test_http_1_0_is_answered_and_closed(live: Live) -> None:
    with Wire(live) as wire:
        answer = wire.send(post("/v1/classify", points(0, 3), version="1.0")).answer()
        assert labels(answer) == ["above"]
        assert answer.headers["connection"] == "close"
        assert wire.closed()


def test_what_is_sent_at_once_is_answered_in_order(live: Live) -> None:
    get = b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n"
    requests = [
        ABOVE,
        BELOW,
        get,
        post("/v1/classify", b"{}"),
        BINARY,
        get,
        get,
        ABOVE,
        post("/v1/nothing", b""),
        BELOW,
    ]
    with Wire(live) as wire:
        wire.send(*requests, *requests)
        for _ in range(2):
            assert labels(wire.answer()) == ["above"]
            assert labels(wire.answer()) == ["below"]
            assert wire.answer().status == 200
            assert wire.answer().status == 400
            assert labels(wire.answer()) == ["below", "above"]
            assert [wire.answer().status for _ in range(2)] == [200, 200]
            assert labels(wire.answer()) == ["above"]
            assert wire.answer().status == 404
            assert labels(wire.answer()) == ["below"]
        assert labels(wire.send(ABOVE).answer()) == ["above"]


def test_a_body_in_chunks(live: Live) -> None:
    body = points(0, 3)
    with Wire(live) as wire:
        for pieces in ([body], [body[:5], body[5:9], body[9:]], [body[i : i + 1] for i in range(len(body))]):
            assert labels(wire.send(chunked("/v1/classify", pieces)).answer()) == ["above"]
        assert labels(wire.send(ABOVE).answer()) == ["above"]
        assert "empty" in wire.send(chunked("/v1/classify", [])).answer().json()["error"]["message"]


def test_a_client_that_asks_before_it_sends(live: Live) -> None:
    request = post("/v1/classify", points(0, 3), "Expect: 100-continue")
    head, _, body = request.partition(b"\r\n\r\n")
    with Wire(live) as wire:
        for _ in range(2):
            assert wire.send(head, b"\r\n\r\n").answer(head_only=True).status == 100
            assert labels(wire.send(body).answer()) == ["above"]
        large = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: {LIMIT + 1}\r\nExpect: 100-continue\r\n\r\n"
        assert wire.send(large.encode()).answer().status == 413


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_other_methods_are_refused(live: Live, method: str) -> None:
    with Wire(live) as wire:
        answer = wire.send(f"{method} /v1/classify HTTP/1.1\r\nHost: x\r\n\r\n".encode()).answer(
            head_only=method == "HEAD"
        )
        assert (answer.status, answer.headers["allow"]) == (405, "POST".lower())
        assert labels(wire.send(ABOVE).answer()) == ["above"]


def test_a_body_beyond_the_limit_is_refused_before_it_has_come(live: Live) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with Wire(live) as wire:
        answer = wire.send(head, b"Content-Length: %d\r\n\r\n" % (LIMIT + 1)).answer()
        assert (answer.status, answer.json()["error"]["code"]) == (413, "body_too_large")
    with Wire(live) as wire:
        wire.send(head, b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n" % (2 * LIMIT), b" " * (LIMIT + 1))
        answer = wire.answer()
        assert (answer.status, answer.json()["error"]["code"]) == (413, "body_too_large")
        # What goes on is not kept, and the connection serves on behind it.
        wire.send(b" " * (LIMIT - 1), b"\r\n0\r\n\r\n")
        assert labels(wire.send(ABOVE).answer()) == ["above"]
    most = post("/v1/classify", points(0, 3) + b" " * (LIMIT - len(points(0, 3))))
    with Wire(live) as wire:
        for _ in range(2):
            assert labels(wire.send(most).answer()) == ["above"]


def test_broken_heads_are_refused_and_the_connection_closed(live: Live) -> None:
    body = points(0, 3)
    double = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"
    both = chunked("/v1/classify", [body]).replace(b"Host: x", b"Host: x\r\nContent-Length: 3")
    for wrong in (b"POST /v1/classify\r\n\r\n", b"nonsense\r\n\r\n", double, both):
        with Wire(live) as wire:
            assert labels(wire.send(ABOVE).answer()) == ["above"]
            assert wire.send(wrong).answer().status == 400
            assert wire.closed()


def requests_of_all_kinds() -> list[bytes]:
    identity = "X-Request-ID: mine-1"
    rows = np.random.default_rng(0).random((6, 2), dtype=np.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8).tobytes()
    octets = "application/octet-stream"
    found = [
        post("/v1/classify", points(0, 3), identity),
        post("/v1/classify", points(0, 3, top_k=1), identity),
        post("/v1/classify", points(0, 3, top_k=0), identity),
        post("/v1/classify", json.dumps({"input": rows.tolist(), "model": "points"}).encode(), identity),
        post("/v1/classify", points(1, 2, 3), identity),
        post("/v1/classify", points(1e300, 2), identity),
        post("/v1/classify", b'{"model": "points", "input": [1, NaN]}', identity),
        post("/v1/classify", b'{"model": "points", "input": [1, 1e999]}', identity),
        post("/v1/classify", b'{"model": "points", "input": [1, null]}', identity),
        post("/v1/classify", b'{"model": "points", "input": [1, [2]]}', identity),
        post("/v1/classify", b'{"model": "points", "input": [1, 2], "top_k": "three"}', identity),
        post("/v1/classify", b'{"model": "points", "input": [1, 2]', identity),
        post("/v1/classify", b"", identity),
        post("/v1/classify", b'{"model": "nobody", "input": [1, 2]}', identity),
        post("/v1/classify", b'{"model": "sums", "input": [1, 2]}', identity),
        post("/v1/classify", b'{"model": "days", "input": "good \\"input\\": [1"}', identity),
        post("/v1/classify", b'{"model": "days", "input": [3, 4]}', identity),
        post("/v1/classify?model=points&top_k=1", rows.tobytes(), identity, kind=octets),
        post("/v1/classify?model=points&top_k=x", rows.tobytes(), identity, kind=octets),
        post("/v1/classify?model=points", rows.tobytes()[1:], identity, kind=octets),
        post("/v1/classify?model=points", np.float32([1, np.nan]).tobytes(), identity, kind=octets),
        post("/v1/classify?model=shades", pixels, identity, kind=octets),
        post("/v1/classify?model=days", b"good day", identity, kind="text/plain"),
        post("/v1/classify?model=days", b"\xff", identity, kind="text/plain"),
        post("/v1/%63lassify", points(0, 3), identity),
        post("/v1/classify/", points(0, 3), identity),
        post("/v1/predict", b'{"model": "sums", "input": [1, 2]}', identity),
        post("/v1/embeddings", b'{"model": "points", "input": [1, 2]}', identity),
        post("/v1/embeddings", b'{"model": "days", "input": ["good"]}', identity),
        post("/v1/classify", points(0, 3), identity, "X-Request-Timeout: soon"),
        post("/v1/classify", points(0, 3), identity, "X-Request-Timeout: 0.000001"),
        post("/v1/classify", points(0, 3), identity, "Connection: close, x"),
        post("/v2/models/points/infer", INFER, identity),
        post("/v2/models/points/versions/1/infer", INFER, identity),
        post("/v2/models/nobody/infer", INFER, identity),
        post("/v2/models/points/infer", b"{}", identity),
        f"GET /health/live HTTP/1.1\r\nHost: x\r\n{identity}\r\n\r\n".encode(),
        f"GET /health/live?x=1 HTTP/1.1\r\nHost: x\r\n{identity}\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
        f"POST /health/live HTTP/1.1\r\nHost: x\r\n{identity}\r\n\r\n".encode(),
        f"POST /v1/classify HTTP/1.1\r\nHost: x\r\n{identity}\r\n\r\n".encode(),
    ]
    asked = json.loads(INFER) | {"parameters": {"binary_data_output": True}}
    return [*found, post("/v2/models/points/infer", json.dumps(asked).encode(), identity)]


def without_date(answer: Answer) -> bytes:
    return re.sub(rb"date: [^\r]*\r\n", b"", answer.raw)


def test_answers_are_those_of_the_asgi_routes_to_the_byte(live: Live, plain: Live) -> None:
    statuses = set()
    for request in requests_of_all_kinds():
        with Wire(live) as hot, Wire(plain) as asgi:
            expected = asgi.send(request).answer()
            statuses.add(expected.status)
            if b"close, x" in request:
                assert without_date(hot.send(request).answer()) == without_date(expected)
                continue
            for _ in range(2):
                assert without_date(hot.send(request).answer()) == without_date(expected), request[:200]
    assert statuses >= {200, 400, 404, 408}


def test_however_the_bytes_come_the_answers_are_the_same(live: Live) -> None:
    get = b"GET /v1/classify HTTP/1.1\r\nHost: x\r\nX-Request-ID: g\r\n\r\n"
    requests = [one for one in requests_of_all_kinds() if b"close, x" not in one and b"0.000001" not in one]
    requests[3:3] = [get, chunked("/v1/classify", [points(0, 3)[:7], points(0, 3)[7:]])]
    unknown = re.compile(rb"x-request-id: [0-9a-f]+-[0-9a-f]+")

    def seen(answer: Answer) -> bytes:
        return unknown.sub(b"", without_date(answer))

    expected = []
    for request in requests:
        with Wire(live) as wire:
            expected.append(seen(wire.send(request).answer()))
    chance = random.Random(0)
    for _ in range(25):
        order = [chance.randrange(len(requests)) for _ in range(12)]
        stream = b"".join(requests[i] for i in order)
        cuts = sorted(chance.randrange(len(stream)) for _ in range(chance.randrange(25)))
        with Wire(live) as wire:
            for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                wire.send(stream[start:end])
                if chance.random() < 0.3:
                    time.sleep(0.001)
            for i in order:
                assert seen(wire.answer()) == expected[i], requests[i][:200]


def test_ids_are_taken_and_made(live: Live) -> None:
    with Wire(live) as wire:
        given = post("/v1/classify", points(0, 3), "X-Request-ID: mine-7")
        assert wire.send(given).answer().headers["x-request-id"] == "mine-7"
        made = {wire.send(ABOVE).answer().headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3
        wrong = post("/v1/classify", points(0, 3), "X-Request-ID: not/one of ours")
        assert re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", wire.send(wrong).answer().headers["x-request-id"])


def test_slow_and_failed_requests_have_a_line(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_vectors(tmp_path / "repository")
    live = start(slow_seconds=1e-9)
    with Wire(live) as wire, caplog.at_level(logging.INFO, "espalier.requests"):
        wire.send(post("/v1/classify", points(0, 3), "X-Request-ID: slow-one")).answer()
        assert any("POST /v1/classify 200" in line and "slow-one" in line for line in caplog.messages)

        def broken(blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
            raise ValueError("the graph is broken")

        batcher = live.repository.get("points").batcher
        assert batcher is not None
        monkeypatch.setattr(batcher, "run", broken)
        monkeypatch.setattr(batcher, "run_alone", None)
        answer = wire.send(post("/v1/classify", points(0, 3), "X-Request-ID: bad-one")).answer()
        assert answer.status == 500
        assert "bad-one" in answer.json()["error"]["message"]
        assert b"graph is broken" not in answer.body
        assert any("POST /v1/classify 500" in line and "bad-one" in line for line in caplog.messages)


def test_a_client_that_leaves_while_it_sends(live: Live) -> None:
    def counted() -> float:
        line = 'espalier_requests_total{model="",outcome="499",route="/v1/classify"}'
        found = [row for row in live.client.get("/metrics").text.splitlines() if row.startswith(line)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    before = counted()
    for _ in range(2):
        with Wire(live) as wire:
            wire.send(ABOVE).answer()
            wire.send(ABOVE[:-3])
    until = time.monotonic() + 10
    while counted() < before + 2:
        assert time.monotonic() < until, "nobody noticed that the clients have left"
        time.sleep(0.01)


class Gate:
    """Holds the runs of a model until it is opened."""

    def __init__(self, live: Live, name: str, patch: pytest.MonkeyPatch) -> None:
        batcher = live.repository.get(name).batcher
        assert batcher is not None
        self.batcher, self.run, self.open = batcher, batcher.run, threading.Event()
        patch.setattr(batcher, "run", self.held)
        patch.setattr(batcher, "run_alone", None)

    def held(self, blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
        assert self.open.wait(20)
        return self.run(blocks, wanted)

    def wait_for(self, rows: int) -> None:
        until = time.monotonic() + 10
        while self.batcher.running + self.batcher.depth() < rows:
            assert time.monotonic() < until
            time.sleep(0.001)


@pytest.fixture
def gated(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Live, Gate]:
    """A server whose model runs on one thread, when the gate is opened."""
    monkeypatch.setattr("server.runtime.model.INLINE_SECONDS", 0.0)
    publish_vectors(tmp_path / "repository")
    live = start(parallel_runs=1)
    return live, Gate(live, "points", monkeypatch)


def test_a_client_that_leaves_lets_go_of_the_model(gated: tuple[Live, Gate]) -> None:
    live, gate = gated
    model = live.repository.get("points")
    with ExitStack() as wires:
        stays, leaves, queued = (wires.enter_context(Wire(live)) for _ in range(3))
        for i, (wire, requests) in enumerate(((stays, ABOVE + BELOW), (leaves, ABOVE), (queued, BELOW)), 1):
            wire.send(requests)
            gate.wait_for(i)
        assert model.requests == 3
        leaves.socket.close()
        queued.socket.close()
        until = time.monotonic() + 10
        while model.requests != 1:
            assert time.monotonic() < until
            time.sleep(0.001)
        gate.open.set()
        assert labels(stays.answer()) == ["above"]
        assert labels(stays.answer()) == ["below"]


def test_a_server_that_stops_answers_what_has_come(gated: tuple[Live, Gate]) -> None:
    live, gate = gated
    with ExitStack() as wires:
        busy, piped, half, idle = (wires.enter_context(Wire(live)) for _ in range(4))
        assert idle.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n").answer().status == 200
        busy.send(ABOVE)
        gate.wait_for(1)
        piped.send(ABOVE, BELOW)
        half.send(ABOVE[:-1])
        gate.wait_for(2)
        live.server.should_exit = True
        assert idle.closed()
        half.send(ABOVE[-1:])
        gate.open.set()
        assert labels(answer := busy.answer()) == ["above"]
        assert answer.headers["connection"] == "close"
        assert labels(piped.answer()) == ["above"]
        assert labels(piped.answer()) == ["below"]
        assert labels(half.answer()) == ["above"]
        for wire in (busy, piped, half):
            assert wire.closed()


def test_connections_that_idle_are_closed_and_others_kept(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.server.config, "timeout_keep_alive", 0.5)
    with Wire(live) as idle, Wire(live) as used:
        idle.send(ABOVE).answer()
        begun = time.monotonic()
        while time.monotonic() < begun + 1.2:
            assert labels(used.send(ABOVE).answer()) == ["above"]
            time.sleep(0.05)
        assert idle.closed()
        assert used.closed()


def test_a_client_that_does_not_read_is_not_read_from(live: Live) -> None:
    """It may send without end; what the server keeps of it and for it stays small."""
    request = post("/v1/classify", json.dumps({"model": "points", "input": [[0, 3]] * 200}).encode())
    with Wire(live) as wire:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        wire.socket.settimeout(0.5)
        stream, sent = request * 50, 0
        with suppress(TimeoutError):
            while sent < 1000 * len(stream):
                sent += wire.socket.send(stream[sent % len(stream) :])
        assert sent < 1000 * len(stream), "the server reads on and on"
        wire.socket.settimeout(20)
        for _ in range(sent // len(request)):
            assert wire.answer().status == 200


def test_many_connections_at_once(live: Live) -> None:
    failures: list[str] = []

    def talk(number: int) -> None:
        chance = random.Random(number)
        with Wire(live) as wire:
            for _ in range(30):
                below = chance.random() < 0.5
                found = labels(wire.send(BELOW if below else ABOVE).answer())
                if found != ["below" if below else "above"]:
                    failures.append(f"{found} instead of {below}")

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert live.repository.get("points").requests == 0


@pytest.mark.slow
def test_sigterm_under_load_fails_no_request(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish_vectors(repository)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--home", str(tmp_path), "--repository", str(repository), "--port", str(port), "--no-worker"]
    process = subprocess.Popen([sys.executable, "-m", "server", *flags], stderr=subprocess.PIPE)
    address = f"http://127.0.0.1:{port}"
    outcomes: list[str] = []
    answered = [0] * 8

    def talk(number: int) -> None:
        buffer = b""
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            while True:
                try:
                    connection.sendall(ABOVE)
                    while buffer.count(b"\r\n\r\n") == 0 or not buffer.endswith(b"}"):
                        part = connection.recv(65536)
                        if not part:
                            outcomes.append("hung up on")
                            return
                        buffer += part
                except OSError as error:
                    outcomes.append(repr(error))
                    return
                if not buffer.startswith(b"HTTP/1.1 200"):
                    outcomes.append(repr(buffer[:100]))
                    return
                answered[number] += 1
                if b"connection: close" in buffer:
                    outcomes.append("told")
                    return
                buffer = b""

    try:
        until = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{address}/health/ready").status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < until
                time.sleep(0.05)
        threads = [threading.Thread(target=talk, args=(i,)) for i in range(len(answered))]
        for thread in threads:
            thread.start()
        while min(answered) < 20:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(timeout=30)
        assert outcomes == ["told"] * len(threads)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
