"""What a separable convolution saves, counted and timed: python -m benchmarks.convolutions

A full 3 × 3 convolution against a depthwise 3 × 3 followed by a 1 × 1, in ONNX Runtime on one thread. By the count the
separable one costs 1 / outputs + 1 / 9 of the full one; by the clock more, since a depthwise convolution does little
work for each number that it reads. Both sides take turns, and the ratio is the median of the rounds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from export.onnx import quiet
from models.cnn.convolution import Separable

# Channels in, channels out, side: shapes from the early to the late layers of MobileNet at 224 pixels.
SHAPES = ((32, 64, 112), (128, 128, 56), (256, 256, 28), (512, 512, 14), (1024, 1024, 7))
KERNEL = 3
BATCH = 4
ROUNDS = 15
RUNS = 4


def full(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, KERNEL, padding=1, bias=False)


def separable(inputs: int, outputs: int) -> nn.Module:
    layer = Separable(inputs, outputs)
    return nn.Sequential(layer.depthwise, layer.pointwise)  # without its norm, which the full one here has not either


def multiply_adds(module: nn.Module, side: int) -> int:
    """Of one image; every convolution here keeps the side."""
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return sum(weight.numel() for weight in weights) * side * side


def runner(module: nn.Module, inputs: int, side: int) -> Callable[[], float]:
    """Seconds of RUNS runs of the exported module, each time it is called."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with quiet():
            torch.onnx.export(module.eval(), (torch.zeros(BATCH, inputs, side, side),), path, dynamo=True)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {session.get_inputs()[0].name: random.normal(size=(BATCH, inputs, side, side)).astype(np.float32)}
    session.run(None, feeds)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(RUNS):
            session.run(None, feeds)
        return time.perf_counter() - start

    return run


@dataclass(frozen=True)
class Compared:
    """formula, counted, timed: what the separable convolution costs, as a share of the full one. Milliseconds are of
    one run of a batch."""

    inputs: int
    outputs: int
    side: int
    formula: float
    counted: float
    timed: float
    full_ms: float
    separable_ms: float


def compare(inputs: int, outputs: int, side: int) -> Compared:
    modules = full(inputs, outputs), separable(inputs, outputs)
    runs = [runner(module, inputs, side) for module in modules]
    times = [(runs[0](), runs[1]()) for _ in range(ROUNDS)]
    counts = [multiply_adds(module, side) for module in modules]
    return Compared(
        inputs=inputs,
        outputs=outputs,
        side=side,
        formula=1 / outputs + 1 / KERNEL**2,
        counted=counts[1] / counts[0],
        timed=median(other / one for one, other in times),
        full_ms=1e3 * median(one for one, _ in times) / RUNS,
        separable_ms=1e3 * median(other for _, other in times) / RUNS,
    )


def main() -> None:
    columns = ("channels", "side", "formula", "counted", "full ms", "separable ms", "timed")
    table = Table(*columns, box=box.SIMPLE, caption=f"medians of {ROUNDS} rounds, {BATCH} images, one thread")
    for shape in SHAPES:
        one = compare(*shape)
        table.add_row(
            f"{one.inputs} → {one.outputs}",
            str(one.side),
            f"{one.formula:.3f}",
            f"{one.counted:.3f}",
            f"{one.full_ms:.2f}",
            f"{one.separable_ms:.2f}",
            f"{one.timed:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
