"""The same inputs through PyTorch and through ONNX Runtime: nothing is published that does not agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from export.bundle import Parity
from models.network import Network

TOLERANCE = 1e-4

Inputs = Mapping[str, np.ndarray]


class ParityError(Exception):
    """The exported graph does not compute what the network computes; the message says by how much."""


def check(network: Network, path: Path, batches: Iterable[Inputs], tolerance: float = TOLERANCE) -> Parity:
    """Compare every output on every batch, and the first batch also at other batch sizes and (for text) lengths.

    Raises ParityError when a value differs by more than `tolerance` (times the output's largest value where that is
    above 1: float32 has seven digits, wherever they stand), when the winning class differs though its lead is larger
    than that, when the graph does not run at some shape, or when there is nothing to compare.
    """
    network.to("cpu").eval()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    samples, largest, disagreements = 0, 0.0, 0
    sizes: set[int] = set()
    lengths: set[int] = set()
    for original, inputs in _with_other_shapes(batches):
        first = inputs[network.input_names[0]]
        shape = f"batch {len(first)}" + (f", length {first.shape[1]}" if "input_ids" in inputs else "")
        with torch.no_grad():
            expected = {
                k: v.numpy() for k, v in network(*(torch.from_numpy(inputs[n]) for n in network.input_names)).items()
            }
        try:
            found = dict(zip(outputs, session.run(outputs, dict(inputs)), strict=True))
        except Exception as error:  # onnxruntime raises a family of its own, one class for each status
            raise ParityError(f"the exported graph does not run at {shape}: {error}") from error
        for name in outputs:
            if found[name].shape != expected[name].shape:
                raise ParityError(
                    f"{name} at {shape}: PyTorch answers shape {list(expected[name].shape)}, ONNX Runtime "
                    f"{list(found[name].shape)}; a dynamic dimension was frozen by the export"
                )
            difference = float(np.abs(found[name] - expected[name]).max())
            allowed = _allowed(expected[name], tolerance)
            if not difference <= allowed:  # also true of NaN
                raise ParityError(
                    f"{name} at {shape}: PyTorch and ONNX Runtime differ by {difference:.2e}, more than {allowed:.0e}"
                )
            largest = max(largest, difference)
        if "logits" in outputs:
            disagreements += _disagreements(expected["logits"], found["logits"], tolerance, shape)
        samples += len(first) if original else 0
        sizes.add(len(first))
        if "input_ids" in inputs:
            lengths.add(first.shape[1])
    if samples == 0:
        raise ParityError("there are no samples to compare PyTorch and ONNX Runtime on")
    return Parity(
        samples=samples,
        largest_difference=largest,
        tolerance=tolerance,
        top1_disagreements=disagreements,
        batch_sizes=sorted(sizes),
        lengths=sorted(lengths),
    )


def _allowed(expected: np.ndarray, tolerance: float) -> float:
    return tolerance * max(1.0, float(np.abs(expected).max()))


def _with_other_shapes(batches: Iterable[Inputs]) -> Iterator[tuple[bool, Inputs]]:
    """Every batch, and behind the first its variants; whether it is one of `batches`."""
    for i, inputs in enumerate(batches):
        yield True, inputs
        if i > 0:
            continue
        yield False, {name: value[:1] for name, value in inputs.items()}
        yield False, {name: np.concatenate([value, value[:3]]) for name, value in inputs.items()}
        if "input_ids" in inputs:
            yield False, {name: np.pad(value, ((0, 0), (0, 5))) for name, value in inputs.items()}
            yield False, {name: value[:, :3] for name, value in inputs.items()}


def _disagreements(expected: np.ndarray, found: np.ndarray, tolerance: float, shape: str) -> int:
    """Rows whose winner differs. Raises ParityError for one that was not a tie."""
    winner = expected.argmax(axis=1)
    rows = np.flatnonzero(winner != found.argmax(axis=1))
    for row in rows:
        lead = float(expected[row, winner[row]] - expected[row, found[row].argmax()])
        if lead > _allowed(expected, tolerance):
            raise ParityError(
                f"logits at {shape}: row {row} has another winning class, though PyTorch's leads by {lead:.2e}"
            )
    return len(rows)
