"""What heads of every kind answer over a real socket: two classes and label sets at /v1/classify, numbers and several
heads at /v1/predict, and there autoencoders, too."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.bundle import Interval
from server.settings import Settings
from tests.server.bundles import (
    publish_greys,
    publish_halves,
    publish_heads,
    publish_moods,
    publish_sides,
    publish_spreads,
    publish_sums,
)
from tests.server.conftest import Live, message_of, running

RAW = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False)
    for publish in (publish_heads, publish_moods, publish_sides, publish_spreads, publish_sums):
        publish(settings.repository)
    publish_halves(settings.repository)
    publish_greys(settings.repository)
    publish_sums(settings.repository, "bounded", Interval(method="conformal", coverage=0.95, margins=[0.5, 2.0]))
    with running(settings) as server:
        yield server


def ask(live: Live, route: str, model: str, given: Any, **more: Any) -> list[dict[str, Any]]:
    response = live.client.post(f"/v1/{route}", json={"model": model, "input": given, **more})
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["data"]
    return found


def logistic(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def test_one_sigmoid_unit_answers_two_classes(live: Live) -> None:
    right, left = ask(live, "classify", "sides", [[9, 2.0], [9, -40.0]])
    assert (right["label"], left["label"]) == ("right", "left")
    assert right["probability"] == pytest.approx(logistic(2.0), abs=1e-6)
    assert left["probability"] == pytest.approx(1.0)
    assert [one["label"] for one in right["top"]] == ["right", "left"]
    assert sum(one["probability"] for one in right["top"]) == pytest.approx(1.0)
    assert right.keys() == {"index", "label", "probability", "top"}
    assert 0.0 < left["top"][1]["probability"] < 1e-15, "of a sure answer the other side is no rounding error"


def test_a_label_set_is_what_reaches_the_threshold(live: Live) -> None:
    both, none, wide = ask(live, "classify", "moods", [[0.0, 3.0], [-1.0, -1.0], [-0.1, 1.0]])
    assert (both["labels"], none["labels"], wide["labels"]) == (["up", "wide"], [], ["wide"])
    assert both["probabilities"] == pytest.approx({"up": 0.5, "wide": logistic(3.0)}, abs=1e-6)
    assert both.keys() == {"index", "labels", "probabilities"}
    low = ask(live, "classify", "moods", [-1.0, -1.0], threshold=0.2)[0]
    assert low["labels"] == ["up", "wide"]
    vector = np.float32([-1.0, 0.5]).tobytes()
    raw = live.client.post("/v1/classify?model=moods&threshold=0.9", content=vector, headers=RAW).json()["data"][0]
    assert raw["labels"] == []


def test_numbers_come_by_their_names(live: Live) -> None:
    one, other = ask(live, "predict", "sums", [[1.5, 2.0], [0.0, -3.0]])
    assert one == {"index": 0, "values": {"sum": 3.5, "difference": -0.5}}
    assert other == {"index": 1, "values": {"sum": -3.0, "difference": 3.0}}


def test_an_interval_of_fixed_width_and_one_of_the_answers_own_deviation(live: Live) -> None:
    bounded = ask(live, "predict", "bounded", [1.5, 2.0])[0]
    assert bounded["interval"] == {"sum": {"low": 3.0, "high": 4.0}, "difference": {"low": -2.5, "high": 1.5}}
    narrow, broad = ask(live, "predict", "spreads", [[10.0, 0.5], [10.0, 3.0]])
    assert narrow["values"] == broad["values"] == {"first": 10.0}
    assert narrow["interval"]["first"] == pytest.approx({"low": 10 - 0.98, "high": 10 + 0.98}, abs=1e-5)
    assert broad["interval"]["first"] == pytest.approx({"low": 10 - 5.88, "high": 10 + 5.88}, abs=1e-5)


def test_every_head_has_its_own_answer(live: Live) -> None:
    (found,) = ask(live, "predict", "heads", [[2.0, -1.0]], top_k=2)
    assert found.keys() == {"index", "heads"}
    heads = found["heads"]
    assert heads["side"]["label"] == "left"
    assert heads["mood"]["labels"] == ["up"]
    assert [one["label"] for one in heads["place"]["top"]] == ["b", "a"]
    assert heads["place"]["probability"] == pytest.approx(np.exp(2) / (1 + np.exp(2) + np.exp(-2)), abs=1e-6)
    assert heads["sum"] == {"values": {"sum": 1.0}, "interval": {"sum": {"low": 0.5, "high": 1.5}}}


def test_all_forms_of_a_body_give_the_same_answer(live: Live) -> None:
    vectors = np.float32([[1.0, 2.0], [3.0, 4.0]])
    in_json = ask(live, "predict", "heads", vectors.tolist(), threshold=0.95)
    raw = live.client.post("/v1/predict?model=heads&threshold=0.95", content=vectors.tobytes(), headers=RAW)
    files = [("file", (f"{i}.bin", row.tobytes())) for i, row in enumerate(vectors)]
    form = live.client.post("/v1/predict", data={"model": "heads", "threshold": "0.95"}, files=files)
    assert raw.json()["data"] == form.json()["data"] == in_json
    assert in_json[0]["heads"]["mood"]["labels"] == []
    assert in_json[1]["heads"]["mood"]["labels"] == ["up", "wide"]


def test_embeddings_and_metrics_are_there_for_these_models_too(live: Live) -> None:
    answer = live.client.post("/v1/embeddings", json={"model": "sums", "input": [3.0, 4.0]}).json()
    assert answer["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    ask(live, "predict", "sums", [1.0, 2.0])
    text = live.client.get("/metrics").text
    assert 'espalier_requests_total{model="sums",outcome="200",route="/v1/predict"}' in text
    assert 'task="multi_task"' in text


def test_a_model_is_asked_at_its_own_place(live: Live) -> None:
    answer = live.client.post("/v1/classify", json={"model": "sums", "input": [1, 2]})
    assert "ask it at /v1/embeddings or /v1/predict" in message_of(answer, 400)
    answer = live.client.post("/v1/predict", json={"model": "moods", "input": [1, 2]})
    assert "ask it at /v1/classify" in message_of(answer, 400)


def test_an_autoencoder_of_vectors_answers_what_comes_back_and_what_is_missing(live: Live) -> None:
    usual, unusual = ask(live, "predict", "halves", [[2.0, 0.0], [2.0, -3.0]])
    assert usual == {"index": 0, "reconstruction": [2.0, 0.0], "error": 0.0, "embedding": [2.0]}
    assert unusual == {"index": 1, "reconstruction": [2.0, 0.0], "error": 4.5, "embedding": [2.0]}
    answer = live.client.post("/v1/embeddings", json={"model": "halves", "input": [-4.0, 4.0]}).json()
    assert answer["data"][0]["embedding"] == [-1.0]


def test_an_autoencoder_of_images_answers_an_image_that_can_be_sent_again(live: Live) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :, 0] = 200
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    raw = live.client.post(
        "/v1/predict?model=greys", content=stream.getvalue(), headers={"content-type": "image/png"}
    ).json()["data"][0]
    kind, _, content = raw["reconstruction"].partition(",")
    assert kind == "data:image/png;base64"
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    assert back.shape == (8, 8, 3)
    assert (back == [100, 0, 0]).all()
    assert raw["embedding"] == [100.0, 0.0, 0.0]
    assert raw["error"] == pytest.approx(100.0**2 / 3)
    again = ask(live, "predict", "greys", raw["reconstruction"])[0]
    assert again["error"] == 0.0
    assert again["reconstruction"] == raw["reconstruction"]
