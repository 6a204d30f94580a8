"""HTTP throughput against raw ONNX Runtime, both in one run: python -m benchmarks.serving [--output FILE]

EfficientNet-Lite0 at 64 × 64 (raw pixels) and an MLP 784-512-512-10 (JSON, float32 bytes, and these as the Open
Inference Protocol has them), at 1, 16, 64 and 256 connections, and beside them an answer with nothing to compute. The
ceiling is ONNX Runtime alone in a process of its own, at its best batch size. Weights are random: they do not change
the speed. The load comes from a process of its own, on the same cores as the server, and costs what the column says.
Both sides take turns, and the ratio is the median of the rounds: machines are not always as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

CONNECTIONS = (1, 16, 64, 256)
BATCHES = (1, 4, 8, 16, 32, 64)
SECONDS = 2.0
ROUNDS = 5


def build(repository: Path) -> None:
    """Publish both models with random weights."""
    from export.bundle import Lineage
    from export.bundling import bundle
    from export.processing.inputs import DataInput, ImageInput, VectorInput
    from models import registry
    from models.spec import Classification, ModelSpec

    labels = [str(digit) for digit in range(10)]
    cases: list[tuple[str, ModelSpec, DataInput, dict[str, np.ndarray]]] = [
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
        while time.perf_counter() - start < SECONDS / len(BATCHES):
            session.run(["logits"], inputs)
            runs += 1
        best = max(best, (rows * runs / (time.perf_counter() - start), rows))
    return best


@contextmanager
def server(home: Path, repository: Path, *more: str) -> Iterator[tuple[int, int]]:
    """`espalier serve` without a worker, with `more` flags; its process id and port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--home", str(home), "--repository", str(repository), "--port", str(port), "--no-worker", *more]
    process = subprocess.Popen([sys.executable, "-m", "server", *flags])
    try:
        for _ in range(600):
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait()


def request(path: str, kind: str, body: bytes, more: str = "") -> bytes:
    """more: headers, each with its line's end."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def infer(vector: bytes) -> bytes:
    """A request of the Open Inference Protocol, tensors in binary both ways."""
    tensor = {"name": "vector", "shape": [1, 784], "datatype": "FP32", "parameters": {"binary_data_size": len(vector)}}
    wanted = {"name": "logits", "parameters": {"binary_data": True}}
    text = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
    length = f"inference-header-content-length: {len(text)}\r\n"
    return request("/v2/models/mlp/infer", "application/octet-stream", text + vector, length)


def cpu_seconds(pid: int) -> float:
    """What the process has used of all cores so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(pid: int, port: int, connections: int, message: bytes) -> dict[str, float]:
    """One round of load: requests a second, p50 and p99 in ms, errors, CPU in µs a request on either side."""
    command = [sys.executable, "-m", "benchmarks.load", "127.0.0.1", str(port), str(connections), str(SECONDS)]
    served, before = cpu_seconds(pid), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, input=message, stdout=subprocess.PIPE, check=True, timeout=60)
    served, after = cpu_seconds(pid) - served, resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(done.stdout)
    requests = len(found["latencies"])
    p50, p99 = np.percentile(found["latencies"], [50, 99]) * 1e3
    asked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "requests": requests,
        "requests_per_second": requests / found["seconds"],
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "errors": found["errors"],
        "server_us": 1e6 * served / requests,
        "load_us": 1e6 * asked / requests,
    }


def isolated(path: Path, model: str) -> tuple[float, int]:
    """`ceiling` in a fresh process, so that nothing of this one slows it."""
    code = "import json, sys; from pathlib import Path; from benchmarks.serving import ceiling; "
    code += "print(json.dumps(ceiling(Path(sys.argv[1]), sys.argv[2])))"
    printed = subprocess.run([sys.executable, "-c", code, str(path), model], capture_output=True, check=True).stdout
    rate, rows = json.loads(printed)
    return rate, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    output = parser.parse_args().output
    console = Console()
    vector = sample("mlp", 1)["vector"]
    pixels = sample("cnn", 1)["pixels"]
    in_json = json.dumps({"model": "mlp", "input": [round(float(x), 4) for x in vector[0]]}).encode()
    binary = "application/octet-stream"
    cases: list[tuple[str, str, bytes]] = [
        ("cnn", "CNN, pixels", request("/v1/classify?model=cnn&top_k=1", binary, pixels.tobytes())),
        ("mlp", "MLP, JSON", request("/v1/classify", "application/json", in_json)),
        ("mlp", "MLP, float32", request("/v1/classify?model=mlp&top_k=1", binary, vector.tobytes())),
        ("mlp", "MLP, /v2, float32", infer(vector.tobytes())),
    ]
    health = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    ceilings: dict[str, list[tuple[float, int]]] = {"cnn": [], "mlp": []}
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        with console.status("exporting the models"):
            build(repository)
        with server(Path(folder) / "home", repository) as (pid, port), Progress(console=console) as progress:
            task = progress.add_task("rounds", total=ROUNDS * (1 + len(cases) * len(CONNECTIONS) + len(ceilings)))
            for _ in range(ROUNDS):
                empty = measure(pid, port, 64, health)
                rounds.setdefault(("health", 64), []).append(empty)
                progress.advance(task)
                for model, found in ceilings.items():
                    found.append(isolated(repository / model / "1" / "model.onnx", model))
                    progress.advance(task)
                    for owner, words, message in cases:
                        for connections in CONNECTIONS if owner == model else ():
                            one = measure(pid, port, connections, message)
                            one["ratio"] = one["requests_per_second"] / found[-1][0]
                            rounds.setdefault((words, connections), []).append(one)
                            progress.advance(task)
    for model, found in ceilings.items():
        rates = sorted(rate for rate, _ in found)
        console.print(
            f"ONNX Runtime alone, {model}: {median(rates):,.0f} samples/s ({rates[0]:,.0f} to {rates[-1]:,.0f}), "
            f"best batch {max(found)[1]}"
        )
    figures = [{"request": words, "connections": n, **middle(found)} for (words, n), found in rounds.items()]
    console.print(table(figures))
    if output is not None:
        output.write_text(json.dumps({"cores": os.cpu_count(), "ceilings": ceilings, "figures": figures}, indent=1))


def middle(found: list[dict[str, float]]) -> dict[str, float]:
    """The median of every figure over the rounds, but all errors."""
    return {name: (sum if name == "errors" else median)(one[name] for one in found) for name in found[0]}


def table(figures: list[dict[str, Any]]) -> Table:
    made = Table(
        *("request", "conns", "req/s", "p50 ms", "p99 ms", "server µs", "load µs", "ratio"),
        caption=f"medians of {ROUNDS} rounds; µs: CPU time a request; ratio: to ONNX Runtime alone\n"
        f"{sum(one['errors'] for one in figures):.0f} requests failed",
        box=box.SIMPLE,
    )
    for one in figures:
        made.add_row(
            one["request"],
            str(one["connections"]),
            f"{one['requests_per_second']:,.0f}",
            f"{one['p50_ms']:.2f}",
            f"{one['p99_ms']:.2f}",
            f"{one['server_us']:.0f}",
            f"{one['load_us']:.0f}",
            f"{one['ratio']:.2f}" if "ratio" in one else "",
        )
    return made


if __name__ == "__main__":
    main()
