"""CPU time of a request to /v2/…/infer apart from HTTP and the session: python -m benchmarks.protocol_cost

What the handler does from the bytes of the body to those of the answer, for one row of 784 float32 to 10 numbers, as
JSON and in binary; the queue answers at once. Beside it what a handler written by hand would do with the same JSON:
json.loads, numpy.array, json.dumps.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np

from export.bundle import Lineage, Manifest, Parity, TensorSpec
from export.processing.inputs import VectorInput
from server.exchange import Exchange
from server.histograms import Distribution
from server.metrics import SECONDS
from server.request_head import Head
from server.routes.v2.infer import infer
from server.tensors import signature

FEATURES, CLASSES = 784, 10
REQUESTS, REPEATS = 2000, 7
PATH = "/v2/models/digits/infer"
LOGITS = np.random.default_rng(1).normal(size=(1, CLASSES)).astype(np.float32)

MANIFEST = Manifest(
    name="digits",
    version=1,
    created_at=datetime.now(UTC),
    task="classification",
    input=VectorInput(features=FEATURES),
    inputs=[TensorSpec(name="vector", dtype="float32", shape=["batch", FEATURES], unit="1")],
    outputs=[TensorSpec(name="logits", dtype="float32", shape=["batch", CLASSES], unit="1")],
    model={},
    parity=Parity(samples=1, largest_difference=0.0, tolerance=1e-4, top1_disagreements=0, batch_sizes=[1]),
    lineage=Lineage(base_model="mlp"),
    files={},
)


class Queue:
    """Stands where a model stands, and answers what it is asked at once."""

    name, version, manifest, raw, texts = "digits", 1, MANIFEST, True, None
    queue_limit, timeout = 1024, 30.0
    answers: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.requests = 0
        self.signature = signature(MANIFEST)
        self.decode_seconds = self.encode_seconds = Distribution(SECONDS)

    def admit(self, left: float, priority: int) -> None:
        pass

    def submit(self, block: np.ndarray, wanted: tuple[str, ...], **options: Any) -> Any:
        assert block.shape == (1, FEATURES)
        future = asyncio.get_running_loop().create_future()
        future.set_result([LOGITS])
        return SimpleNamespace(future=future)


class Given(Exchange):
    """A request whose body is there."""

    request_id = "mine"

    def __init__(self, shared: Any, head: Head, content: bytes) -> None:
        super().__init__(shared, time.perf_counter())
        self.take(head)
        self.content = content

    async def buffer(self) -> bytes:
        return self.content

    def chunks(self) -> Any:
        raise NotImplementedError("the body comes at once")

    def gone(self) -> bool:
        return False


def step(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


def cost(ask: Callable[[], Any]) -> float:
    """Microseconds of CPU, the least of some rounds: what else runs on the machine adds to it."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(REQUESTS):
            ask()
        times.append((time.process_time() - start) / REQUESTS * 1e6)
    return min(times)


def by_hand(body: bytes) -> bytes:
    (tensor,) = json.loads(body)["inputs"]
    row = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    assert np.isfinite(row).all()
    found = {"name": "logits", "datatype": "FP32", "shape": [1, CLASSES], "data": LOGITS.ravel().tolist()}
    return json.dumps({"model_name": "digits", "model_version": "1", "outputs": [found]}).encode()


async def main() -> None:
    row = np.random.default_rng(0).random((1, FEATURES)).astype(np.float32)
    numbers = [round(value, 4) for value in row[0].tolist()]
    tensor = {"name": "vector", "shape": [1, FEATURES], "datatype": "FP32"}
    flat = json.dumps({"inputs": [{**tensor, "data": numbers}]}).encode()
    nested = json.dumps({"inputs": [{**tensor, "data": [numbers]}]}).encode()
    described = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": row.nbytes}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    model = Queue()
    shared: Any = SimpleNamespace(
        repository=SimpleNamespace(get=lambda reference, session: model),
        metrics=None,
        settings=SimpleNamespace(request_seconds=30.0, max_body_bytes=2**25),
        traces=None,
    )

    def asking(body: bytes, *headers: tuple[bytes, bytes]) -> float:
        head = Head("POST", PATH, b"", [(b"host", b"localhost"), *headers])
        return cost(lambda: step(infer(Given(shared, head, body))))

    written = cost(lambda: by_hand(flat))
    print(f"one row of {FEATURES} float32, {len(flat):,} bytes of JSON; CPU µs a request")
    for name, found in (
        ("JSON, a flat list", asking(flat)),
        ("JSON, lists in a list", asking(nested)),
        (
            "binary",
            asking(described + row.tobytes(), (b"inference-header-content-length", str(len(described)).encode())),
        ),
        ("binary, nothing but the tensor", asking(row.tobytes(), (b"inference-header-content-length", b"0"))),
    ):
        print(f"{name:32}{found:8.1f}   by hand {written:6.1f}   {written / found:5.1f}x")


if __name__ == "__main__":
    asyncio.run(main())
