"""What is left of the throughput under four times as much load: python -m benchmarks.overload [--output FILE]

The peak is what a closed loop gets, at 16 and 64 connections; then requests arrive at four times that rate for a
minute, whatever becomes of them, and the peak is taken again. Every request has a second for its answer
(X-Request-Timeout). Goodput: answers (200) that came in that time. The load comes from a process of its own, on the
same cores as the server, so what it costs is missing there: the more, the more is refused.

The model is EfficientNet-Lite0 at --size pixels, some milliseconds an image, asked with raw pixels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving import cpu_seconds, request, server

CONNECTIONS = (16, 64)
TIMES = 4.0
DEADLINE_SECONDS = 1.0


def build(repository: Path, size: int) -> None:
    """Publish the model with random weights."""
    from export.bundle import Lineage
    from export.bundling import bundle
    from export.processing.inputs import ImageInput
    from models import registry
    from models.spec import Classification, ModelSpec

    spec = ModelSpec(architecture="efficientnet_lite0", hyperparameters={"image_size": size}, task=Classification(10))
    bundle(
        registry.build(spec),
        name="cnn",
        repository=repository,
        input=ImageInput(height=size, width=size),
        labels=[str(digit) for digit in range(10)],
        tokenizer=None,
        validation=[{"pixels": pixels(size, 4)}],
        metrics={},
        evaluation=None,
        lineage=Lineage(base_model=spec.architecture),
    )


def pixels(size: int, rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), dtype=np.uint8)


def asked(size: int, deadline: float) -> bytes:
    head, separator, body = request(
        "/v1/classify?model=cnn&top_k=1", "application/octet-stream", pixels(size, 1).tobytes()
    ).partition(b"\r\n\r\n")
    return head + b"\r\nx-request-timeout: %g" % deadline + separator + body


def closed(port: int, message: bytes, seconds: float) -> float:
    """The most answers a second that came in time."""
    best = 0.0
    for connections in CONNECTIONS:
        found = loaded("benchmarks.load", [str(port), str(connections), str(seconds / len(CONNECTIONS))], message)
        in_time = sum(latency <= DEADLINE_SECONDS for latency in found["latencies"]) - found["errors"]
        best = max(best, in_time / found["seconds"])
    return best


def loaded(module: str, arguments: Sequence[str], message: bytes) -> dict[str, Any]:
    command = [sys.executable, "-m", module, "127.0.0.1", *arguments]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, input=message, stdout=subprocess.PIPE, check=True).stdout
    )
    return found


class Watch(threading.Thread):
    """The resident memory of a process, every second, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.over = pid, threading.Event()
        self.found: list[int] = []

    def run(self) -> None:
        while not self.over.wait(1.0):
            status = Path(f"/proc/{self.pid}/status").read_text()
            self.found.append(1024 * int(status.partition("VmRSS:")[2].split()[0]))


def overload(pid: int, port: int, message: bytes, rate: float, seconds: float) -> dict[str, Any]:
    """Figures of so many requests a second."""
    watch = Watch(pid)
    watch.start()
    served = cpu_seconds(pid)
    found = loaded("benchmarks.open_load", [str(port), str(rate), str(seconds)], message)
    served = cpu_seconds(pid) - served
    watch.over.set()
    answers: list[tuple[int, float, float]] = found["answers"]
    good = [latency for status, latency, _ in answers if status == 200]
    refused = [latency for status, latency, _ in answers if status == 429]
    statuses = Counter(status for status, _, _ in answers)
    late = [
        sent for status, latency, sent in answers if status == 408 or (status == 200 and latency > DEADLINE_SECONDS)
    ]
    # The last of them are answered when nothing is asked any more.
    span = max([found["seconds"], *(sent + latency for status, latency, sent in answers if status == 200)])
    half = watch.found[len(watch.found) // 2 :] or [0]
    return {
        "offered_per_second": (len(answers) + found["unanswered"]) / found["seconds"],
        "goodput_per_second": sum(latency <= DEADLINE_SECONDS for latency in good) / span,
        "answers": dict(statuses),
        "late": len(late),
        "late_by_second": Counter(map(int, late)),
        "unanswered": found["unanswered"],
        "answer_ms": percentiles(good),
        "refusal_ms": percentiles(refused),
        "memory_mib": [round(size / 2**20, 1) for size in watch.found],
        "memory_growth": max(half) / half[0] - 1.0,
        "server_cores": served / found["seconds"],
        "connections": found["connections"],
        "generator_latest_ms": 1e3 * found["latest"],
    }


def percentiles(seconds: list[float]) -> list[float]:
    """p50, p99 and the most, in ms."""
    return [round(float(1e3 * one), 2) for one in np.percentile(seconds or [0.0], [50, 99, 100])]


def measure(pid: int, port: int, message: bytes, seconds: float) -> dict[str, Any]:
    before = closed(port, message, seconds / 4)
    figures = overload(pid, port, message, TIMES * before, seconds)
    after = closed(port, message, seconds / 4)
    peak = (before + after) / 2
    return {"peaks_per_second": [before, after], "ratio": figures["goodput_per_second"] / peak, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--size", type=int, default=128, help="of an image, in pixels")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        build(repository, options.size)
        with server(Path(folder) / "home", repository) as (pid, port):
            # The largest batches there are, so that the session has all the memory that it ever takes.
            loaded("benchmarks.load", [str(port), "256", "5"], asked(options.size, 30.0))
            found = measure(pid, port, asked(options.size, DEADLINE_SECONDS), options.seconds)
    before, after = found["peaks_per_second"]
    memory = found["memory_mib"]
    print(f"peak, closed loop: {before:,.0f} answers/s before, {after:,.0f} after")
    print(f"offered: {found['offered_per_second']:,.0f}/s for {options.seconds:g} s")
    print(f"goodput: {found['goodput_per_second']:,.0f}/s, {found['ratio']:.3f} of the peak")
    print(f"answers by status: {found['answers']}; unanswered {found['unanswered']}; past the deadline {found['late']}")
    print(
        "an answer took p50 {} p99 {} most {} ms; a 429 p50 {} p99 {} most {} ms".format(
            *found["answer_ms"], *found["refusal_ms"]
        )
    )
    print(
        f"memory: {memory[0]} MiB after 1 s, {memory[len(memory) // 2]} half way, {memory[-1]} at the end; in the "
        f"second half {100 * found['memory_growth']:+.1f} % at most"
    )
    print(
        f"server: {found['server_cores']:.2f} cores; the generator was {found['generator_latest_ms']:.0f} ms late at "
        f"worst, with {found['connections']} connections"
    )
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
