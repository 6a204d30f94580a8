"""POST /v1/classify and /v1/embeddings over a real socket, in every form that an input may have."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from server.runtime.batcher import Block, Value, Wanted
from server.runtime.throughput import Throughput
from server.settings import Settings
from tests.server.bundles import publish_images, publish_texts, publish_vectors
from tests.server.conftest import Live, message_of, running


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False)
    for publish in (publish_vectors, publish_images, publish_texts):
        publish(settings.repository)
    with running(settings) as server:
        yield server


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def labels(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [answer["label"] for answer in response.json()["data"]]


def ask(live: Live, model: str, given: object, **more: object) -> httpx.Response:
    return live.client.post("/v1/classify", json={"model": model, "input": given, **more})


def test_one_input_and_many_in_json(live: Live) -> None:
    assert labels(ask(live, "days", "good day")) == ["good"]
    assert labels(ask(live, "days", ["bad day", "good good day", "bad"])) == ["bad", "good", "bad"]
    assert labels(ask(live, "points", [0, 3])) == ["above"]
    assert labels(ask(live, "points", [[0, 3], [0, -3]])) == ["above", "below"]
    assert labels(ask(live, "shades", data_url(png(200)))) == ["light"]
    assert labels(ask(live, "shades", [data_url(png(20)), data_url(png(200))])) == ["dark", "light"]


def test_raw_bodies(live: Live) -> None:
    def send(model: str, content: bytes, kind: str) -> list[str]:
        return labels(live.client.post(f"/v1/classify?model={model}", content=content, headers={"content-type": kind}))

    assert send("shades", png(200), "image/png") == ["light"]
    assert send("shades", png(20), "application/octet-stream") == ["dark"]
    pixels = np.stack([np.full((8, 8, 3), shade, np.uint8) for shade in (20, 200)])
    assert send("shades", pixels.tobytes(), "application/octet-stream") == ["dark", "light"]
    assert send("points", np.float32([0, -1, 0, 1]).tobytes(), "application/octet-stream") == ["below", "above"]
    assert send("days", b"good day", "text/plain") == ["good"]


def test_a_form_with_files(live: Live) -> None:
    files = [("file", ("a.png", png(20))), ("file", ("b.png", png(200)))]
    response = live.client.post("/v1/classify", data={"model": "shades", "top_k": "1"}, files=files)
    assert labels(response) == ["dark", "light"]
    assert all(len(answer["top"]) == 1 for answer in response.json()["data"])


def test_the_answer_says_who_answered_and_how_sure(live: Live) -> None:
    body = ask(live, "points:1", [0, 3], top_k=2).json()
    assert (body["model"], body["version"]) == ("points", 1)
    top = body["data"][0]["top"]
    assert [one["label"] for one in top] == ["above", "below"]
    assert sum(one["probability"] for one in top) == pytest.approx(1.0)
    assert top[0]["probability"] == pytest.approx(1 / (1 + np.exp(-6)), abs=1e-5)


def test_tokens_are_counted_and_long_texts_cut(live: Live) -> None:
    assert ask(live, "days", "good good day").json()["usage"]["prompt_tokens"] == 3
    assert ask(live, "days", "good " * 100).json()["usage"]["prompt_tokens"] == 16


def test_embeddings_have_unit_length_in_both_encodings(live: Live) -> None:
    request = {"model": "days", "input": ["good good bad", "bad"]}
    plain = live.client.post("/v1/embeddings", json=request).json()
    coded = live.client.post("/v1/embeddings", json={**request, "encoding_format": "base64"}).json()
    for one, other in zip(plain["data"], coded["data"], strict=True):
        vector = np.array(one["embedding"], np.float32)
        assert np.linalg.norm(vector) == pytest.approx(1.0)
        np.testing.assert_array_equal(vector, np.frombuffer(base64.b64decode(other["embedding"]), "<f4"))
    assert plain["usage"]["prompt_tokens"] == 4


def test_embeddings_of_token_ids_are_those_of_the_text(live: Live) -> None:
    def embed(given: object) -> object:
        return live.client.post("/v1/embeddings", json={"model": "days", "input": given}).json()["data"]

    assert embed("good bad day") == embed([2, 3, 4])
    assert embed(["good", "bad"]) == embed([[2], [3]])


def test_embeddings_of_vectors_and_images(live: Live) -> None:
    for model, given in (("points", [1, 2]), ("shades", data_url(png(3)))):
        response = live.client.post("/v1/embeddings", json={"model": model, "input": given})
        assert len(response.json()["data"][0]["embedding"]) == 4


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "days", "input": [9999]}, "token ids run from"),
        ({"model": "days", "input": [1] * 17}, "1 to 16"),
        ({"model": "days", "input": "good", "dimensions": 7}, "gives 4"),
        ({"model": "days", "input": []}, "empty list"),
        ({"model": "days", "input": "good", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_embeddings_that_cannot_be_made(live: Live, body: dict[str, object], words: str) -> None:
    assert words in message_of(live.client.post("/v1/embeddings", json=body), 400)


def test_a_deadline_that_has_passed_is_a_408(live: Live) -> None:
    response = live.client.post(
        "/v1/classify", json={"model": "days", "input": "good"}, headers={"x-request-timeout": "0.000001"}
    )
    assert "deadline" in message_of(response, 408)
    for wrong in ("soon", "0", "-1", "nan"):
        answer = live.client.post("/v1/classify", json={}, headers={"x-request-timeout": wrong})
        assert "X-Request-Timeout" in message_of(answer, 400)


def test_priorities_are_few(live: Live) -> None:
    body = {"model": "days", "input": "good"}
    for level in ("-3", "0", "3"):
        assert live.client.post("/v1/classify", json=body, headers={"x-request-priority": level}).status_code == 200
    for wrong in ("4", "-4", "high", ""):
        answer = live.client.post("/v1/classify", json=body, headers={"x-request-priority": wrong})
        assert "X-Request-Priority" in message_of(answer, 400)


def test_more_than_can_be_answered_in_time_is_a_429_before_the_input_is_read(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = live.repository.get("days")
    assert model.batcher is not None
    monkeypatch.setattr(model, "requests", 10_000)
    monkeypatch.setattr(model.batcher, "answered", Throughput())
    model.batcher.answered.add(100, 1.0)
    answer = live.client.post("/v1/classify", json={"model": "days", "input": {"not": "read"}})
    assert "later than the request may wait" in message_of(answer, 429)
    assert answer.json()["error"]["code"] == "overloaded"
    assert int(answer.headers["retry-after"]) >= 1
    assert 'espalier_rejected_total{model="days",reason="overload"} 1' in live.client.get("/metrics").text


def test_a_client_that_hangs_up_in_the_queue_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.runtime.model.INLINE_SECONDS", 0.0)
    settings = Settings(home=tmp_path, port=0, worker=False, parallel_runs=1)
    publish_vectors(settings.repository)
    body = b'{"model": "points", "input": [0, %d]}'
    head = b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with running(settings) as live:
        batcher = live.repository.get("points").batcher
        assert batcher is not None
        run, gate, ran = batcher.run, threading.Event(), []

        def held(blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
            assert gate.wait(10)
            ran.extend(float(row[1]) for block in blocks for row in block)
            return run(blocks, wanted)

        monkeypatch.setattr(batcher, "run", held)
        monkeypatch.setattr(batcher, "run_alone", None)
        host, port = live.address.removeprefix("http://").split(":")
        connections = []
        for number in (1, 2, 3):
            connections.append(socket.create_connection((host, int(port))))
            connections[-1].sendall(head % len(body % number) + body % number)
            while batcher.running + batcher.depth() < number:
                time.sleep(0.001)
        connections[1].close()
        time.sleep(0.05)
        gate.set()
        for i in (0, 2):
            with connections[i]:
                assert b" 200 " in connections[i].recv(4096)
        assert ran == [1, 3]
        assert (
            'espalier_requests_total{model="points",outcome="499",route="/v1/classify"} 1'
            in live.client.get("/metrics").text
        )


def test_metrics_count_what_was_answered(live: Live) -> None:
    def value(line: str) -> float:
        text = live.client.get("/metrics").text
        found = [row for row in text.splitlines() if row.startswith(line)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    good = 'espalier_requests_total{model="points",outcome="200",route="/v1/classify"}'
    bad = 'espalier_requests_total{model="points",outcome="400",route="/v1/classify"}'
    stage = 'espalier_stage_seconds_count{model="points",stage="inference",version="1"}'
    before = value(good), value(bad), value(stage)
    ask(live, "points", [0, 1])
    ask(live, "points", [0, 1, 2])
    assert (value(good), value(bad)) == (before[0] + 1, before[1] + 1)
    assert value(stage) == before[2] + 1
    assert value('espalier_model_info{model="points",provider="CPUExecutionProvider"') == 1.0
    assert value('espalier_jobs{state="queued"}') == 0.0
