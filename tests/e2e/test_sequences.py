"""Networks over sequences go the whole path: uploaded, trained by a job, exported, asked over HTTP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from demo.datasets import catalogue
from export.processing.inputs import SeriesInput, TextInput
from tests.e2e.conftest import published
from tests.server.conftest import Live

pytestmark = pytest.mark.slow

HELD_OUT = 100


def right(live: Live, model: str, inputs: list[Any], labels: list[str]) -> float:
    """The share of inputs that are classified as labelled, all in one request."""
    response = live.client.post("/v1/classify", json={"model": model, "input": inputs})
    assert response.status_code == 200, response.text
    return float(np.mean([one["label"] == label for one, label in zip(response.json()["data"], labels, strict=True)]))


def columns_of(image: np.ndarray) -> list[list[float]]:
    """A digit as the pen may have met it: its columns from left to right, without the blank ones at either end."""
    inked = np.flatnonzero(image.any(axis=0))
    return image.T[inked[0] : inked[-1] + 1].tolist()  # type: ignore[no-any-return]


def test_series_of_different_length(live: Live) -> None:
    digits = load_digits()
    series = [columns_of(image) for image in digits.images[:700]]
    labels = [str(target) for target in digits.target[:700]]
    assert {6, 7, 8} <= {len(one) for one in series}
    rows = [{"series": one, "label": label} for one, label in zip(series, labels, strict=True)]
    manifest = published(
        live,
        rows[HELD_OUT:],
        name="strokes",
        model={"architecture": "gru", "hyperparameters": {"width": 32, "bidirectional": True}},
        hyperparameters={"n_epochs": 15, "batch_size": 32, "learning_rate": 0.01},
    )
    assert manifest.input == SeriesInput(channels=8, max_length=16)
    assert len(manifest.parity.lengths) >= 3
    held_out, truth = series[:HELD_OUT], labels[:HELD_OUT]
    assert right(live, "strokes", held_out, truth) >= 0.9

    raw = np.array(held_out[0], "<f4").tobytes()
    headers = {"content-type": "application/octet-stream"}
    in_binary = live.client.post("/v1/classify?model=strokes", content=raw, headers=headers).json()["data"][0]
    in_json = live.client.post("/v1/classify", json={"model": "strokes", "input": held_out[0]}).json()["data"][0]
    assert in_binary == in_json
    found = live.client.post("/v1/embeddings", json={"model": "strokes", "input": held_out[:3]}).json()["data"]
    assert [len(one["embedding"]) for one in found] == [64] * 3


def test_texts_with_a_vocabulary_of_their_own(live: Live) -> None:
    texts = [
        (text, language)
        for language in ("de", "it", "fi")
        for text in sorted({translation for _, translation in catalogue(language) if len(translation) > 20})[:300]
    ]
    order = np.random.default_rng(0).permutation(len(texts))
    rows = [{"text": texts[i][0], "label": texts[i][1]} for i in order]
    manifest = published(
        live,
        rows[HELD_OUT:],
        name="tongues",
        model={"architecture": "gru", "hyperparameters": {"vocabulary_size": 800, "width": 32, "embedding": 32}},
        max_length=64,
        hyperparameters={"n_epochs": 6, "batch_size": 32, "learning_rate": 0.01},
    )
    assert isinstance(manifest.input, TextInput)
    assert manifest.model["hyperparameters"]["vocabulary"] == 800
    held_out = rows[:HELD_OUT]
    assert right(live, "tongues", [row["text"] for row in held_out], [row["label"] for row in held_out]) >= 0.85

    again = published(
        live,
        rows[HELD_OUT:],
        name="again",
        model="tongues",
        hyperparameters={"n_epochs": 1, "batch_size": 32, "learning_rate": 0.001},
    )
    assert again.files["tokenizer.json"] == manifest.files["tokenizer.json"], "it goes on with its vocabulary"
    assert again.metrics["accuracy"] >= 0.85
