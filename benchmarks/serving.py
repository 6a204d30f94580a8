"""HTTP throughput against raw ONNX Runtime, both in one run: python -m benchmarks.serving [--output FILE]

EfficientNet-Lite0 at 64 × 64 (raw pixels) and an MLP 784-512-512-10 (JSON and float32 bytes), at 1, 16 and 64
connections. The ceiling is ONNX Runtime alone in a process of its own, at its best batch size. Weights are random:
they do not change the speed. The load comes from a process of its own, on the same cores as the server.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

CONCURRENCY = (1, 16, 64)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = 5.0


def build(repository: Path) -> None:
    """Publish both models with random weights."""
    from export.bundle import Lineage
    from export.bundling import bundle
    from export.processing.inputs import ImageInput, InputSpec, VectorInput
    from models import registry
    from models.spec import Classification, ModelSpec

    labels = [str(digit) for digit in range(10)]
    cases: list[tuple[str, ModelSpec, InputSpec, dict[str, np.ndarray]]] = [
        (
            "cnn",
            ModelSpec(architecture="efficientnet_lite0", hyperparameters={"image_size": 64}, task=Classification(10)),
            ImageInput(height=64, width=64),
            sample("cnn", 4),
        ),
        (
            "mlp",
            ModelSpec(
                architecture="mlp", hyperparameters={"features": 784, "hidden": [512, 512]}, task=Classification(10)
            ),
            VectorInput(features=784),
            sample("mlp", 4),
        ),
    ]
    for name, spec, input, inputs in cases:
        bundle(
            registry.build(spec),
            name=name,
            repository=repository,
            input=input,
            labels=labels,
            tokenizer=None,
            validation=[inputs],
            metrics={},
            evaluation=None,
            lineage=Lineage(base_model=spec.architecture),
        )


def sample(model: str, rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    if model == "cnn":
        return {"pixels": random.integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8)}
    return {"vector": random.random((rows, 784), dtype=np.float32)}


def ceiling(path: Path, model: str) -> tuple[float, int]:
    """Samples a second of ONNX Runtime alone with its default settings, and the batch size that gives them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    best = (0.0, 0)
    for rows in BATCHES:
        inputs = sample(model, rows)
        session.run(["logits"], inputs)
        start, runs = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS / 3:
            session.run(["logits"], inputs)
            runs += 1
        best = max(best, (rows * runs / (time.perf_counter() - start), rows))
    return best


@contextmanager
def server(home: Path, repository: Path) -> Iterator[tuple[str, int]]:
    """`espalier serve` without a worker; its host and port."""
    port = 18431
    flags = ["--home", str(home), "--repository", str(repository), "--port", str(port), "--no-worker"]
    process = subprocess.Popen([sys.executable, "-m", "server", *flags])
    try:
        for _ in range(200):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait()


def request(path: str, kind: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def measure(place: tuple[str, int], concurrency: int, message: bytes) -> dict[str, Any]:
    """Requests a second, p50 and p99 in milliseconds, errors; after a second of warm-up."""
    for seconds in (1.0, SECONDS):
        command = [sys.executable, "-m", "benchmarks.load", place[0], str(place[1]), str(concurrency), str(seconds)]
        found = json.loads(
            subprocess.run(command, input=message, stdout=subprocess.PIPE, check=True, timeout=60).stdout
        )
    p50, p99 = np.percentile(found["latencies"], [50, 99]) * 1e3
    return {
        "requests_per_second": len(found["latencies"]) / found["seconds"],
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "errors": found["errors"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    output = parser.parse_args().output
    console = Console()
    vector = sample("mlp", 1)["vector"]
    pixels = sample("cnn", 1)["pixels"]
    in_json = json.dumps({"model": "mlp", "input": [round(float(x), 4) for x in vector[0]]}).encode()
    binary = "application/octet-stream"
    cases: list[tuple[str, str, bytes]] = [
        ("cnn", "CNN, raw pixels", request("/v1/classify?model=cnn&top_k=1", binary, pixels.tobytes())),
        ("mlp", "MLP, JSON", request("/v1/classify", "application/json", in_json)),
        ("mlp", "MLP, float32 bytes", request("/v1/classify?model=mlp&top_k=1", binary, vector.tobytes())),
    ]
    table = Table("request", "connections", "requests/s", "p50 ms", "p99 ms", "errors", "of the ceiling")
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        with console.status("exporting the models"):
            build(repository)
        ceilings: dict[str, tuple[float, int]] = {}
        for model in ("cnn", "mlp"):
            with console.status(f"ONNX Runtime alone: {model}"):
                ceilings[model] = isolated(repository / model / "1" / "model.onnx", model)
            rate, rows = ceilings[model]
            console.print(f"ONNX Runtime alone, {model}: {rate:,.0f} samples/s at batch {rows}")
        with server(Path(folder) / "home", repository) as place:
            empty = measure(place, 64, b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")["requests_per_second"]
            console.print(f"GET /health/live at 64 connections: {empty:,.0f} requests/s")
            for model, words, message in cases:
                for concurrency in CONCURRENCY:
                    with console.status(f"{words} at {concurrency}"):
                        found = measure(place, concurrency, message)
                    ratio = found["requests_per_second"] / ceilings[model][0]
                    figures.append({"request": words, "connections": concurrency, **found, "ratio": ratio})
                    table.add_row(
                        words,
                        str(concurrency),
                        f"{found['requests_per_second']:,.0f}",
                        f"{found['p50_ms']:.2f}",
                        f"{found['p99_ms']:.2f}",
                        str(found["errors"]),
                        f"{ratio:.2f}",
                    )
    console.print(table)
    if output is not None:
        output.write_text(json.dumps({"cores": os.cpu_count(), "ceilings": ceilings, "figures": figures}, indent=1))


def isolated(path: Path, model: str) -> tuple[float, int]:
    """`ceiling` in a fresh process, so that nothing of this one slows it."""
    code = "import json, sys; from pathlib import Path; from benchmarks.serving import ceiling; "
    code += "print(json.dumps(ceiling(Path(sys.argv[1]), sys.argv[2])))"
    printed = subprocess.run([sys.executable, "-c", code, str(path), model], capture_output=True, check=True).stdout
    rate, rows = json.loads(printed)
    return rate, rows


if __name__ == "__main__":
    main()
