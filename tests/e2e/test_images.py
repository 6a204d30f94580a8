"""Networks that make images go the whole path: images uploaded without labels, a job, images from noise over HTTP."""

from __future__ import annotations

import base64
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from export.processing.latents import drawn
from models import registry
from models.gan import Gan, Sampler
from tests.e2e.conftest import published_file
from tests.server.conftest import Live

pytestmark = pytest.mark.slow


def unlabelled(items: int) -> bytes:
    """A zip of digits of 16 pixels, none in a folder."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for i, image in enumerate(load_digits().images[:items]):
            stream = io.BytesIO()
            Image.fromarray((image * 15.9).astype(np.uint8)).resize((16, 16)).save(stream, "PNG")
            archive.writestr(f"{i}.png", stream.getvalue())
    return whole.getvalue()


def published(live: Live, name: str, **recipe: Any) -> Path:
    """The folder of what a job publishes, when it is served."""
    published_file(live, "digits.zip", unlabelled(200), name=name, image_size=16, **recipe)
    return live.settings.repository / name / "1"


def pictures(live: Live, name: str, **fields: Any) -> np.ndarray:
    """uint8 [images, 16, 16, 3]."""
    response = live.client.post("/v1/images/generations", json={"model": name, **fields})
    assert response.status_code == 200, response.text
    files = [base64.b64decode(item["b64_json"]) for item in response.json()["data"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


QUICK = {"n_epochs": 4, "batch_size": 16, "learning_rate": 1e-3}


def test_a_gan_learns_from_images_without_labels_and_makes_new_ones(live: Live) -> None:
    folder = published(
        live,
        "digits-gan",
        model={"architecture": "gan", "hyperparameters": {"width": 8, "latent": 8}},
        hyperparameters=QUICK,
    )
    many = pictures(live, "digits-gan", seed=5, n=8)
    network = registry.restore(folder).eval()
    assert isinstance(network, Gan)
    with torch.no_grad():
        expected = Sampler(network.generator)(torch.from_numpy(drawn(5, 8, 8)))["image"].numpy()
    assert np.abs(many.astype(int) - expected).max() <= 1
    assert many.std(axis=0).any()
    assert np.abs(pictures(live, "digits-gan", seed=5)[0].astype(int) - many[0]).max() <= 1
    way = pictures(live, "digits-gan", interpolation={"from": 5, "to": 6, "steps": 5})
    assert np.abs(way[0].astype(int) - many[0]).max() <= 1
    assert np.abs(way[-1].astype(int) - pictures(live, "digits-gan", seed=6)[0]).max() <= 1

    details = live.client.get("/v1/models/digits-gan").json()
    assert details["task"] == "generation"
    assert details["manifest"]["input"]["type"] == "latent"
    refused = live.client.post("/v1/classify", json={"model": "digits-gan", "input": "x"})
    assert "ask it at /v1/images/generations" in refused.json()["error"]["message"]


def test_a_variational_autoencoder_makes_images_beside_reading_them(live: Live) -> None:
    published(
        live,
        "digits-vae",
        model={"architecture": "vae", "hyperparameters": {"channels": [4, 8], "hidden": [16], "latent": 3}},
        hyperparameters=QUICK,
    )
    images = pictures(live, "digits-vae", latent=[[0, 0, 0], [2, 0, 0]])
    assert images.shape == (2, 16, 16, 3)
    assert (images[0] != images[1]).any()
    stream = io.BytesIO()
    Image.fromarray(images[1]).save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    answer = live.client.post("/v1/embeddings", json={"model": "digits-vae", "input": url})
    assert len(answer.json()["data"][0]["embedding"]) == 3
