"""Autoencoders go the whole path: uploaded without labels, trained by a job, exported, asked over HTTP, and from there
on to a classifier."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.e2e.conftest import published_file
from tests.server.conftest import Live

pytestmark = pytest.mark.slow

DIGITS = load_digits()


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray((image * 15.9).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def pixels(content: str) -> np.ndarray:
    """Of a PNG in base64, int [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)


def predict(live: Live, model: str, given: list[Any]) -> list[dict[str, Any]]:
    response = live.client.post("/v1/predict", json={"model": model, "input": given})
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


def lines(rows: np.ndarray, labels: np.ndarray | None = None) -> bytes:
    items = [{f"pixel{i}": value for i, value in enumerate(row)} for row in rows.tolist()]
    if labels is not None:
        items = [{**item, "label": f"digit {label}"} for item, label in zip(items, labels, strict=True)]
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def test_images_are_reconstructed_and_what_is_unlike_them_is_seen(live: Live) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for i, image in enumerate(DIGITS.images[:700]):
            archive.writestr(f"{i}.png", png(image))
    manifest = published_file(
        live,
        "digits.zip",
        whole.getvalue(),
        name="drawn",
        model={"architecture": "vae", "hyperparameters": {"channels": [8, 16], "hidden": [32], "latent": 8}},
        image_size=16,
        hyperparameters={"n_epochs": 8, "batch_size": 16, "learning_rate": 0.004},
    )
    assert manifest.model["hyperparameters"]["image_size"] == 16
    (listed,) = [one for one in live.client.get("/v1/models").json()["data"] if one["id"] == "drawn"]
    assert (listed["task"], listed["modality"], listed["classes"]) == ("reconstruction", "image", None)
    assert listed["metrics"]["explained_variance"] > 0.3

    usual = [png(image) for image in DIGITS.images[1000:1020]]
    unusual = [png(16.0 - image) for image in DIGITS.images[1000:1020]]
    urls = [f"data:image/png;base64,{base64.b64encode(one).decode()}" for one in [*usual, *unusual]]
    found = predict(live, "drawn", urls)
    errors = [one["error"] for one in found]
    assert max(errors[:20]) < min(errors[20:]), "a negative is no digit"
    kind, _, content = found[0]["reconstruction"].partition(",")
    assert kind == "data:image/png;base64"
    assert pixels(content).shape == (16, 16, 3)
    codes = live.client.post("/v1/embeddings", json={"model": "drawn", "input": urls[0]}).json()["data"][0]["embedding"]
    code = np.array(found[0]["embedding"])
    np.testing.assert_allclose(codes, code / np.linalg.norm(code), atol=1e-5)

    given = {"model": "drawn", "latent": [found[0]["embedding"]]}
    made = live.client.post("/v1/images/generations", json=given).json()["data"][0]["b64_json"]
    assert np.abs(pixels(made) - pixels(content)).max() <= 1, "what is generated from a code is what it comes back as"
    drawn = live.client.post("/v1/images/generations", json={"model": "drawn", "n": 3, "seed": 1}).json()
    assert drawn["size"] == "16x16"
    assert len({one["b64_json"] for one in drawn["data"]}) == 3


def test_what_was_learned_without_labels_begins_a_classifier(live: Live) -> None:
    manifest = published_file(
        live,
        "digits.jsonl",
        lines(DIGITS.data[:1000]),
        name="codes",
        model={"architecture": "autoencoder", "hyperparameters": {"hidden": [64], "code": 32}},
        objective={"type": "reconstruction", "masking": 0.3},
        hyperparameters={"n_epochs": 15, "batch_size": 32, "learning_rate": 0.003},
    )
    assert manifest.task == "reconstruction"
    row = DIGITS.data[1500]
    (found,) = predict(live, "codes", [row.tolist()])
    back = np.array(found["reconstruction"])
    assert np.square(back - row).mean() < np.square(DIGITS.data.mean(0) - row).mean()
    assert len(found["embedding"]) == 32

    classifier = published_file(
        live,
        "few.jsonl",
        lines(DIGITS.data[:300], DIGITS.target[:300]),
        name="labelled",
        model="codes:1",
        objective={"type": "cross_entropy"},
        transfer={"freeze": "all", "unfreeze_epoch": 3},
        hyperparameters={"n_epochs": 12, "batch_size": 16, "learning_rate": 0.003},
    )
    assert classifier.lineage.base_model == "codes:1"
    answers = live.client.post(
        "/v1/classify", json={"model": "labelled", "input": DIGITS.data[1500:1600].tolist()}
    ).json()["data"]
    right = [one["label"] == f"digit {DIGITS.target[1500 + i]}" for i, one in enumerate(answers)]
    assert np.mean(right) >= 0.8
