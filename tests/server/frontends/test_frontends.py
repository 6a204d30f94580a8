"""A server with two front-ends over real sockets: clients cannot tell it from one without, and nothing is lost when
models, front-ends or the server change.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from server.keys import KeyStore, Limits, Scope
from server.settings import Settings
from tests.server import bundles
from tests.server.chains import publish_language_model, publish_translation
from tests.server.conftest import Live, message_of, running, until

pytestmark = pytest.mark.slow


def png(size: int = 8) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def publish_all(repository: Path) -> None:
    for publish in (
        *(bundles.publish_vectors, bundles.publish_sides, bundles.publish_moods, bundles.publish_sums),
        *(bundles.publish_spreads, bundles.publish_heads, bundles.publish_halves, bundles.publish_greys),
        *(bundles.publish_series, bundles.publish_images, bundles.publish_texts, bundles.publish_generator),
    ):
        publish(repository)
    publish_language_model(repository)
    publish_translation(repository)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Live]]:
    """A server without front-ends and one with two, that serve the same repository."""
    repository = tmp_path_factory.mktemp("repository")
    publish_all(repository)
    limits: dict[str, Any] = {"port": 0, "worker": False, "repository": repository, "max_body_bytes": 300_000}
    with (
        running(Settings(home=tmp_path_factory.mktemp("alone"), **limits)) as alone,
        running(Settings(home=tmp_path_factory.mktemp("fronts"), frontends=2, **limits)) as fronts,
    ):
        yield alone, fronts


def told(response: httpx.Response) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, without what is another at every request."""
    headers = {name: value for name, value in response.headers.items() if name != "date"}
    body = re.sub(rb'"created":\d+', b'"created":0', response.content)
    if "allow" in headers:  # Litestar names them in the order of a set of strings, which is another in every process
        headers["allow"] = ", ".join(sorted(headers["allow"].split(", ")))
        body = b" ".join(sorted(body.replace(b",", b"").split()))
    return response.status_code, headers, body


URL = "data:image/png;base64," + base64.b64encode(png()).decode()
FLOATS = np.random.default_rng(0).random((3, 2), dtype=np.float32).tobytes()
OCTETS = {"content-type": "application/octet-stream"}
TENSOR = {"name": "vector", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, -4]}
TENSORS = {"inputs": [TENSOR]}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/classify", {"json": {"model": "points", "input": [1, 2]}}),
    ("/v1/classify", {"json": {"model": "points:1", "input": [[1, 2], [3, -4], [0, 0]], "top_k": 1}}),
    ("/v1/classify?model=points", {"content": FLOATS, "headers": OCTETS}),
    ("/v1/classify", {"json": {"model": "sides", "input": [1, 2]}}),
    ("/v1/classify", {"json": {"model": "moods", "input": [1, -2], "threshold": 0.3}}),
    ("/v1/classify", {"json": {"model": "days", "input": ["a good day", "bad"]}}),
    ("/v1/classify?model=days", {"content": b"a good day", "headers": {"content-type": "text/plain"}}),
    ("/v1/classify", {"json": {"model": "trends", "input": [[1, 2], [3, 4]]}}),
    ("/v1/classify", {"json": {"model": "shades", "input": [URL, URL]}}),
    ("/v1/classify?model=shades", {"content": png(), "headers": {"content-type": "image/png"}}),
    ("/v1/classify?model=shades", {"files": {"file": ("a.png", png(20))}}),
    ("/v1/predict", {"json": {"model": "sums", "input": [[1, 2], [3, 4]]}}),
    ("/v1/predict", {"json": {"model": "spreads", "input": [1, 2]}}),
    ("/v1/predict", {"json": {"model": "heads", "input": [[1, 2], [0, -1]]}}),
    ("/v1/predict", {"json": {"model": "halves", "input": [[1, 2], [0, -1]]}}),
    ("/v1/predict", {"json": {"model": "greys", "input": URL}}),
    ("/v1/embeddings", {"json": {"model": "points", "input": [1, 2]}}),
    ("/v1/embeddings", {"json": {"model": "days", "input": "good day", "encoding_format": "base64"}}),
    ("/v1/images/generations", {"json": {"model": "shades-of-grey", "prompt": "", "n": 2, "seed": 7}}),
    ("/v1/completions", {"json": {"model": "tales", "prompt": "once", "seed": 1, "temperature": 0}}),
    ("/v1/completions", {"json": {"model": "german", "prompt": "good day"}}),
    ("/v1/tokenize", {"json": {"model": "days", "prompt": "good day"}}),
    ("/v1/classify", {"json": {"model": "nothing", "input": [1, 2]}}),
    ("/v1/classify", {"json": {"model": "points:7", "input": [1, 2]}}),
    ("/v1/classify", {"json": {"model": "sums", "input": [1, 2]}}),
    ("/v1/classify", {"json": {"model": "tales", "input": "once"}}),
    ("/v1/classify", {"json": {"model": "points", "input": [1, 2, 3]}}),
    ("/v1/classify", {"json": {"model": "points", "input": [[1, 2]] * 2000}}),
    ("/v1/classify", {"content": b"{"}),
    ("/v1/classify", {"content": b""}),
    ("/v1/classify", {"content": b" " * 400_000}),
    ("/v1/chat/completions", {"content": b" " * 400_000}),
    ("/v1/classify", {"json": {"model": "points", "input": [1, 2]}, "headers": {"x-request-timeout": "soon"}}),
    ("/v1/classify", {"json": {"model": "points", "input": [1, 2]}, "headers": {"x-request-timeout": "0.0000001"}}),
    ("/v2/models/points/infer", {"json": TENSORS}),
    ("/v2/models/points/versions/1/infer", {"json": {**TENSORS, "id": "mine", "outputs": [{"name": "logits"}]}}),
    ("/v2/models/heads/infer", {"json": {**TENSORS, "parameters": {"binary_data_output": True}}}),
    ("/v2/models/points/infer", {"content": FLOATS, "headers": {**OCTETS, "inference-header-content-length": "0"}}),
    ("/v2/models/nothing/infer", {"json": TENSORS}),
    ("/v2/models/tales/infer", {"json": TENSORS}),
    ("/v1/fine_tuning/jobs", {"json": {"model": "mlp"}}),
    ("/nothing", {"json": {}}),
]


@pytest.mark.parametrize(("path", "request_"), ASKED)
def test_answers_are_the_same_byte_for_byte(path: str, request_: dict[str, Any], both: tuple[Live, Live]):
    headers = {"x-request-id": "same", **request_.get("headers", {})}
    alone, fronts = (told(live.client.post(path, **{**request_, "headers": headers})) for live in both)
    assert alone == fronts


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/classify",
        "/v1/models",
        "/v1/models/points",
        "/health/ready",
        "/v2/models/points/infer",
        "/v2/models/points",
        "/no%20thing?a=b",
    ],
)
def test_methods_are_answered_the_same(method: str, path: str, both: tuple[Live, Live]):
    headers = {"x-request-id": "same"}
    alone, fronts = (told(live.client.request(method, path, headers=headers)) for live in both)
    assert alone == fronts


def test_a_request_keeps_its_id(both: tuple[Live, Live]):
    for path in ("/v1/classify", "/v1/models"):
        response = both[1].client.get(path, headers={"x-request-id": "mine"})
        assert response.headers.get_list("x-request-id") == ["mine"]
        other = both[1].client.get(path)
        assert len(other.headers.get_list("x-request-id")) == 1


def test_a_large_file_goes_through_as_it_comes(both: tuple[Live, Live]):
    _, live = both
    rows = [{"text": f"row {number} " + "x" * 200, "label": "ab"[number % 2]} for number in range(20_000)]
    content = "\n".join(map(json.dumps, rows)).encode()
    made = live.upload("rows.jsonl", content)
    assert made.status_code == 200, made.text
    assert made.json()["bytes"] == len(content)
    with live.client.stream("GET", f"/v1/files/{made.json()['id']}/content") as response:
        assert response.read() == content

    def pieces() -> Iterator[bytes]:
        head = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        yield head + b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        for start in range(0, len(content), 100_000):
            yield content[start : start + 100_000]
        yield b"\r\n--b--\r\n"

    chunked = {"content-type": "multipart/form-data; boundary=b"}
    made = live.client.post("/v1/files", content=pieces(), headers=chunked)
    assert made.status_code == 200, made.text
    assert made.json()["bytes"] == len(content)


def test_a_chat_is_streamed_and_ends_where_its_client_leaves(both: tuple[Live, Live]):
    _, live = both
    with openai.OpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0) as client:
        asked: Any = [{"role": "user", "content": "today"}]
        events = list(client.chat.completions.create(model="tales", messages=asked, stream=True, temperature=0))
        whole = client.chat.completions.create(model="tales", messages=asked, temperature=0)
    said = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert len(events) > 2
    assert said == whole.choices[0].message.content


def counted(text: str, name: str, **labels: str) -> float:
    """The sum of all samples of this name with these labels."""
    total = 0.0
    for line in text.splitlines():
        found = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
        if found and found[1] == name and all(f'{key}="{value}"' in found[2] for key, value in labels.items()):
            total += float(found[3])
    return total


def test_metrics_are_those_of_all_processes_at_once(both: tuple[Live, Live]):
    _, live = both

    def now() -> tuple[float, ...]:
        text = httpx.get(f"{live.address}/metrics").text
        ok = counted(text, "espalier_requests_total", route="/v1/classify", model="points", outcome="200")
        seconds = counted(text, "espalier_request_seconds_count", model="points")
        stages = [counted(text, "espalier_stage_seconds_count", model="points", stage=s) for s in ("decode", "queue")]
        return ok, seconds, *stages, counted(text, "espalier_frontend_requests_total")

    before = now()
    for _ in range(25):  # each on a connection of its own, so that both have some
        httpx.post(f"{live.address}/v1/classify", json={"model": "points", "input": [1, 2]}).raise_for_status()
    after = now()
    assert [late - early for late, early in zip(after, before, strict=True)] == [25, 25, 25, 25, 26]
    text = httpx.get(f"{live.address}/metrics").text
    assert [counted(text, "espalier_frontend_up", frontend=number) for number in "01"] == [1, 1]
    assert all(counted(text, "espalier_frontend_requests_total", frontend=number) > 0 for number in "01")


class Load:
    """Clients that ask one after the other, each on its connection. answers: version and status of each answer;
    broken: connections that ended without one."""

    def __init__(self, address: str, clients: int = 8, model: str = "points") -> None:
        self.address, self.model = address, model
        self.answers: list[tuple[int, int]] = []
        self.broken: list[Exception] = []
        self.wrong: list[str] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(30)

    def wait(self, more: int) -> None:
        """Until there are so many more answers."""
        until, deadline = len(self.answers) + more, time.monotonic() + 30
        while len(self.answers) < until:
            assert time.monotonic() < deadline, f"{len(self.answers)} answers, {self.broken[-3:]}"
            time.sleep(0.005)

    def _ask(self) -> None:
        client = httpx.Client(base_url=self.address, timeout=20)
        while not self.over.is_set():
            try:
                response = client.post("/v1/classify", json={"model": self.model, "input": [1, 2]})
            except httpx.TransportError as error:
                self.broken.append(error)
                client = httpx.Client(base_url=self.address, timeout=20)
                time.sleep(0.01)
                continue
            version = response.json().get("version", 0)
            self.answers.append((version, response.status_code))
            if response.status_code != 200:
                self.wrong.append(response.text)


def test_models_are_swapped_under_load_and_no_request_fails(tmp_path: Path):
    """The weights of a version say which it is: an answer must come from the one that it names."""
    repository = tmp_path / "repository"

    def publish(version: int) -> None:
        scale = [[0.0, 0.0], [float(version), 0.0]]
        bundles.publish_head(repository, "points", "classification", {"logits": scale}, labels=["a", "b"])

    publish(1)
    settings = Settings(home=tmp_path, port=0, worker=False, frontends=2, poll_seconds=0.05)
    with running(settings) as live, Load(live.address) as load:
        seen: list[dict[str, Any]] = []
        for version in range(2, 12):
            load.wait(20)
            publish(version)
            asked = {"model": "points", "input": [0, 1]}
            named = live.client.post("/v1/classify", json={**asked, "model": f"points:{version}"})
            assert named.status_code == 200, "a version that was published just now is waited for"
            while not seen or seen[-1]["version"] != version:
                seen.append(live.client.post("/v1/classify", json=asked).json())
        load.wait(20)
        retired = live.repository.retiring
        until = time.monotonic() + 10
        while retired and time.monotonic() < until:
            time.sleep(0.02)
        assert not retired, "versions that nobody asks for any more are freed"
    assert not load.broken
    assert not load.wrong
    assert {version for version, _ in load.answers} == set(range(1, 12))
    for answer in seen:
        expected = 1 / (1 + np.exp(-float(answer["version"])))
        assert answer["data"][0]["probability"] == pytest.approx(expected, abs=1e-6)


def test_what_a_request_changes_is_so_for_the_next_wherever_that_comes(tmp_path: Path):
    settings = Settings(home=tmp_path, port=0, worker=False, frontends=2, auth="on", poll_seconds=0.05)
    for version in (1, 2, 3):
        bundles.publish_constant(settings.repository, "digits", version)
    with running(settings) as live:
        admin, _ = KeyStore(live.store).create("admin", [Scope.ADMIN], Limits())
        bearer = {"authorization": f"Bearer {admin}"}
        path = "/v1/models/digits/aliases/production"
        until(lambda: live.client.get("/v1/models", headers=bearer).status_code == 200)
        asked: dict[str, Any] = {"json": {"model": "digits@production", "input": [1, 2]}}
        for version in (1, 2, 1, 2, 3):
            changed = live.client.put(path, json={"version": version}, headers=bearer)
            assert changed.status_code == 200, changed.text
            for _ in range(4):  # each on a connection of its own
                answer = httpx.post(f"{live.address}/v1/predict", headers=bearer, **asked).json()
                assert (answer["version"], answer["data"][0]["values"]["number"]) == (version, version)
        wanted = {"name": "few", "scopes": ["infer"], "limits": {"requests_per_minute": 10}}
        made = live.client.post("/v1/keys", json=wanted, headers=bearer).json()
        few = {"authorization": f"Bearer {made['key']}"}
        statuses = [httpx.post(f"{live.address}/v1/predict", headers=few, **asked).status_code for _ in range(20)]
        assert set(statuses) == {200, 429}
        assert 10 <= statuses.count(200) <= 12, "both take from the same bucket, which fills again meanwhile"
        text = live.client.get("/metrics", headers=bearer).text
        limited = counted(text, "espalier_key_requests_total", key=made["id"], outcome="limited")
        assert limited == statuses.count(429)
        live.client.delete(f"/v1/keys/{made['id']}", headers=bearer).raise_for_status()
        refused = [httpx.post(f"{live.address}/v1/predict", headers=few, **asked).status_code for _ in range(4)]
        assert refused == [401] * 4


class Process:
    """A server in a process of its own."""

    def __init__(self, home: Path, **settings: Any) -> None:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in {"port": 0, **settings}.items()]
        command = [sys.executable, "-m", "server", f"--home={home}", "--no-worker", "--frontends=2", *flags]
        self.lines: list[str] = []
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
        threading.Thread(target=self._read, daemon=True).start()
        self.address = self.line(r"ready on (http://\S+)")[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def line(self, pattern: str) -> re.Match[str]:
        """The first line of the log that has this; waits for it."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for line in self.lines[:]:
                if found := re.search(pattern, line):
                    return found
            time.sleep(0.02)
        raise AssertionError(f"no {pattern} in {self.lines}")

    def front_ends(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        threads = children.parents[1].glob("*/children")
        found = [int(pid) for file in threads for pid in file.read_text().split()]
        return [pid for pid in found if b"server.frontends" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@contextmanager
def started(home: Path, **settings: Any) -> Iterator[Process]:
    bundles.publish_vectors(home / "repository")
    server = Process(home, **settings)
    try:
        yield server
    finally:
        with suppress(ProcessLookupError):
            server.process.kill()
        server.process.wait()


def gone(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    return True


def test_a_front_end_that_is_killed_is_started_again_and_the_other_goes_on(tmp_path: Path):
    with started(tmp_path) as server, Load(server.address) as load:
        load.wait(50)
        first, other = server.front_ends()
        os.kill(first, signal.SIGKILL)
        server.line(r"front-end \d has ended with status -9; it is started again")
        load.wait(100)
        until(lambda: len(server.front_ends()) == 2)
        assert other in server.front_ends()
        text = ""

        def up() -> bool:
            nonlocal text
            text = httpx.get(f"{server.address}/metrics").text
            return counted(text, "espalier_frontend_up") == 2

        until(up)
        load.wait(50)
        assert not load.wrong
        assert len(load.broken) <= 8, "only connections to the one that was killed broke"
        assert counted(text, "espalier_queue_rows", model="points") <= 8
        load.over.set()
        server.process.terminate()
        assert server.process.wait(20) == 0


def test_sigterm_fails_no_request_that_was_taken(tmp_path: Path):
    with started(tmp_path) as server, Load(server.address) as load:
        load.wait(100)
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(20) == 0
        load.over.set()
        assert not load.wrong
        # A connection that was open and idle may be closed; none is while it waits for an answer.
        assert not [error for error in load.broken if isinstance(error, httpx.ReadTimeout)]
        assert len(load.answers) >= 100


def test_without_the_inference_process_front_ends_say_so_and_end(tmp_path: Path):
    with started(tmp_path, drain_seconds=5) as server:
        front_ends = server.front_ends()
        waiting = httpx.Client(base_url=server.address, timeout=20)
        waiting.get("/health/live").raise_for_status()
        os.kill(server.process.pid, signal.SIGSTOP)
        found: list[httpx.Response] = []
        asked = {"model": "points", "input": [1, 2]}
        threads = [
            threading.Thread(target=lambda: found.append(waiting.post("/v1/classify", json=asked))),
            threading.Thread(target=lambda: found.append(httpx.get(f"{server.address}/v1/models", timeout=20))),
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        os.kill(server.process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(20)
        assert len(found) == 2
        for response in found:
            assert "inference process has stopped" in message_of(response, 503)
        assert server.process.wait(20) == -signal.SIGKILL
        until(lambda: all(map(gone, front_ends)))


def test_full_queues_and_deadlines_are_told_as_ever(tmp_path: Path):
    with started(tmp_path, queue_limit=4) as server:
        asked = {"model": "points", "input": [[1, 2]] * 5}
        refused = httpx.post(f"{server.address}/v1/classify", json=asked)
        assert "at most 4" in message_of(refused, 400)
        late = httpx.post(
            f"{server.address}/v1/classify",
            json={"model": "points", "input": [1, 2]},
            headers={"x-request-timeout": "0.0000001"},
        )
        assert "deadline" in message_of(late, 408)


def test_a_port_that_is_taken_is_refused_in_words(tmp_path: Path):
    with started(tmp_path) as server:
        port = server.address.rpartition(":")[2]
        command = [sys.executable, "-m", "server", f"--home={tmp_path}", "--no-worker", "--frontends=1"]
        second = subprocess.run(
            [*command, f"--port={port}"], capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=30
        )
        assert second.returncode == 1
        assert f"port {port}" in second.stderr
