"""What a step of a recurrent cell costs: Elman's, GRU, LSTM."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.architectures import counting
from benchmarks.architectures.claims.claim import Claim, Finished, Section
from benchmarks.architectures.pictures import table
from export.onnx import export_onnx
from models import registry
from models.spec import Embedding, ModelSpec

CELLS = ("rnn", "gru", "lstm")
CHANNELS = 16
WIDTHS = (64, 256, 512)
LENGTH = 128
ROUNDS = 21


@dataclass(frozen=True)
class Cell:
    """run: one pass over a series, in seconds."""

    parameters: int
    multiply_adds: float
    run: Callable[[], float]


def cell(architecture: str, width: int) -> Cell:
    """One layer over a series, as it is exported. multiply_adds: of a step."""
    hyperparameters = {"channels": CHANNELS, "width": width}
    network = registry.build(ModelSpec(architecture=architecture, hyperparameters=hyperparameters, task=Embedding()))
    random = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {
        "series": random.normal(size=(1, LENGTH, CHANNELS)).astype(np.float32),
        "attention_mask": np.ones((1, LENGTH), np.int64),
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(network, Path(folder), inputs)
        path = Path(folder) / "model.onnx"
        counted = counting.count(path, inputs)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, inputs)

    def run() -> float:
        start = time.perf_counter()
        session.run(None, inputs)
        return time.perf_counter() - start

    return Cell(sum(parameter.numel() for parameter in network.parameters()), counted / LENGTH, run)


def measure(finished: Finished) -> Section:
    rows = []
    counted: dict[int, float] = {}
    timed: dict[int, float] = {}
    for width in WIDTHS:
        cells = {architecture: cell(architecture, width) for architecture in CELLS}
        times = [{architecture: one.run() for architecture, one in cells.items()} for _ in range(ROUNDS)]
        fastest = {architecture: min(round[architecture] for round in times) for architecture in CELLS}
        for architecture, one in cells.items():
            share = one.multiply_adds / cells["lstm"].multiply_adds
            rows.append(
                (
                    architecture.upper(),
                    str(width),
                    f"{one.parameters:,}",
                    f"{one.multiply_adds:,.0f}",
                    f"{share:.3f}",
                    f"{1e6 * fastest[architecture] / LENGTH:.2f}",
                    f"{fastest[architecture] / fastest['lstm']:.3f}",
                )
            )
        counted[width] = cells["gru"].multiply_adds / cells["lstm"].multiply_adds
        timed[width] = fastest["gru"] / fastest["lstm"]
    header = ("cell", "width", "parameters", "multiply-adds a step", "of the LSTM's", "µs a step", "of the LSTM's")
    slower = [width for width, share in timed.items() if share >= 1.0]
    by_width = ", ".join(f"{share:.2f} at a width of {width}" for width, share in timed.items())
    text = f"""One layer over a series of {LENGTH} steps of {CHANNELS} numbers, one at a time, as exported, in ONNX
Runtime on one thread; the fastest of {ROUNDS} rounds in which the cells take turns.

{table(header, rows)}

A GRU has three gates where an LSTM has four: it multiplies {counted[WIDTHS[0]]:.2f} as much. Of an LSTM's time it takes
{by_width}."""
    if slower:
        text += f"""
By the clock it is no cheaper at a width of {" and ".join(map(str, slower))}, where other work than products counts."""
    holds = max(*counted.values(), timed[WIDTHS[-1]]) < 1.0
    return Section("A GRU's step costs less than an LSTM's", holds, text)


CLAIM = Claim("cells", measure)
