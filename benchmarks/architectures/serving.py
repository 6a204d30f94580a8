"""One request at a time to one server that serves every row."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import msgspec
import numpy as np

from benchmarks.serving import measure, request
from export.bundle import Manifest

# Where a model of a task is asked.
PLACES = {
    "classification": "/v1/classify",
    "binary": "/v1/classify",
    "multi_label": "/v1/classify",
    "regression": "/v1/predict",
    "multi_task": "/v1/predict",
    "reconstruction": "/v1/predict",
    "generation": "/v1/images/generations",
    "translation": "/v1/completions",
    "language_model": "/v1/completions",
    "masked_language_model": "/v1/embeddings",
    "embedding": "/v1/embeddings",
}
TOKENS = 16


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds of one request at a time, from the first byte that is sent to the last that comes back."""

    p50: float
    p99: float
    answers: str


def body(manifest: Manifest, content: Any) -> dict[str, Any]:
    """The JSON of a request about one item of the data."""
    if manifest.task == "generation":
        return {"model": manifest.name, "prompt": "", "n": 1, "response_format": "b64_json"}
    if isinstance(content, bytes):
        content = "data:image/png;base64," + base64.b64encode(content).decode()
    elif isinstance(content, np.ndarray):
        content = content.tolist()
    if PLACES[manifest.task] == "/v1/completions":
        return {"model": manifest.name, "prompt": content, "max_tokens": TOKENS}
    return {"model": manifest.name, "input": content}


def latency(pid: int, port: int, manifest: Manifest, content: Any) -> Latency:
    """Raises RuntimeError with the server's words for an answer that is an error."""
    asked = body(manifest, content)
    place = PLACES[manifest.task]
    first = httpx.post(f"http://127.0.0.1:{port}{place}", json=asked, timeout=60)
    if first.is_error:
        raise RuntimeError(f"{manifest.name}: {place} answers {first.status_code}: {first.text}")
    found = measure(pid, port, 1, request(place, "application/json", json.dumps(asked).encode()))
    if found["errors"]:
        raise RuntimeError(f"{manifest.name}: {found['errors']:.0f} requests failed")
    return Latency(found["p50_ms"], found["p99_ms"], place)
