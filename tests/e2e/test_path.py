"""The whole path over a real socket: upload, job, events, evaluation, export, served answers. With OpenAI's client."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from demo.client import events
from export import bundle

pytestmark = pytest.mark.slow

CLASSES = 3
ITEMS = 40


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def digit_files() -> dict[str, bytes]:
    """Real digits 0, 1 and 2 as 8 × 8 PNG files in class folders."""
    data = load_digits(n_class=CLASSES)
    found: dict[str, bytes] = {}
    for label in range(CLASSES):
        for i, image in enumerate(data.images[data.target == label][: ITEMS + 10]):
            found[f"{label}/{i}.png"] = png((image * 16).clip(0, 255).astype(np.uint8))
    return found


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


class Served:
    """`espalier serve` as a process of its own."""

    def __init__(self, home: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.home = home
        espalier = Path(sys.executable).with_name("espalier")
        self.command = [str(espalier), "serve", "--home", str(home), "--port", str(port)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, env={**os.environ, "ESPALIER_POLL_SECONDS": "0.2"})
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("the server does not become ready")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("home"))
    yield server
    server.process.terminate()
    assert server.process.wait(60) == 0


def test_openais_client_goes_the_whole_path(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    members = digit_files()
    training = {name: content for name, content in members.items() if int(Path(name).stem) < ITEMS}
    held_out = {name: content for name, content in members.items() if name not in training}

    file = client.files.create(file=("digits.zip", zipped(training)), purpose="fine-tune")
    assert file.status == "processed"
    assert [found.id for found in client.files.list()] == [file.id]

    job = client.fine_tuning.jobs.create(
        model="efficientnet-lite0",
        training_file=file.id,
        seed=3,
        hyperparameters={"n_epochs": 6, "batch_size": 16, "learning_rate_multiplier": 2},
        extra_body={"name": "digits", "image_size": 64},
    )
    assert job.status == "queued"
    with httpx.Client(base_url=served.url) as http:
        followed = list(events(http, job.id))
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == "digits:1"
    assert [e["data"]["state"] for e in followed if e["type"] == "state"] == [
        "queued",
        "validating",
        "running",
        "exporting",
        "succeeded",
    ]
    listed = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    assert [event.id for event in listed] == [event["id"] for event in followed][::-1]
    assert next(iter(client.fine_tuning.jobs.checkpoints.list(job.id))).step_number > 0
    assert [found.id for found in client.fine_tuning.jobs.list()] == [job.id]

    deadline = time.monotonic() + 60
    while "digits" not in [model.id for model in client.models.list()] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client.models.retrieve("digits").owned_by == "espalier"

    right = 0
    for name, content in held_out.items():
        answer = httpx.post(
            f"{served.url}/v1/classify?model=digits", content=content, headers={"content-type": "image/png"}
        )
        right += answer.json()["data"][0]["label"] == name[0]
    assert right / len(held_out) >= 0.9

    url = "data:image/png;base64," + base64.b64encode(next(iter(held_out.values()))).decode()
    embedding = client.embeddings.create(model="digits", input=[url, url]).data
    assert len(embedding) == 2
    assert np.linalg.norm(embedding[0].embedding) == pytest.approx(1.0, abs=1e-4)

    with pytest.raises(openai.NotFoundError, match="no file"):
        client.fine_tuning.jobs.create(model="efficientnet-lite0", training_file="file-none")

    folder = served.home / "repository" / "digits" / "1"
    manifest = bundle.verify(folder)
    assert manifest.parity.samples == 12
    assert manifest.parity.top1_disagreements == 0
    assert manifest.lineage.job_id == job.id
    assert {
        "evaluation.json",
        "evaluation.png",
        "training_curve.png",
        "training_curve.json",
        "MODEL_CARD.md",
    } <= manifest.files.keys()


def test_a_server_killed_in_a_job_goes_on_with_it(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    file = client.files.create(file=("digits.zip", zipped(digit_files())), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="efficientnet-lite0",
        training_file=file.id,
        hyperparameters={"n_epochs": 3, "batch_size": 16},
        extra_body={"name": "survivor", "image_size": 32, "checkpoint_seconds": 0},
    )
    deadline = time.monotonic() + 480
    while not client.fine_tuning.jobs.checkpoints.list(job.id).data and time.monotonic() < deadline:
        time.sleep(0.1)
    served.kill()
    served.start()
    while (
        client.fine_tuning.jobs.retrieve(job.id).status not in ("succeeded", "failed") and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
    assert bundle.versions(served.home / "repository", "survivor") == [1]
