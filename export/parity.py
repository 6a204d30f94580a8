"""The same inputs through PyTorch and through ONNX Runtime: nothing is published that does not agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from export import slot_parity
from export.bundle import Parity
from models.decoder_parts import LanguageNetwork
from models.network import Graph, Network

TOLERANCE = 1e-4

NOTHING = "there are no samples to compare PyTorch and ONNX Runtime on"

Inputs = Mapping[str, np.ndarray]


class ParityError(Exception):
    """The exported graph does not compute what the network computes; the message says by how much."""


def check(network: Network, folder: Path, batches: Iterable[Inputs], tolerance: float = TOLERANCE) -> Parity:
    """Compare every output of every graph in `folder` on every batch, and the first batch also at other batch sizes
    and, where it has one, at other lengths.

    Raises ParityError when a value differs by more than `tolerance` (times the output's largest value where that is
    above 1: float32 has seven digits, wherever they stand; by one where it is a whole number, which rounding may
    change), when the winning class differs though its lead is larger than that, when the graph does not run at some
    shape, or when there is nothing to compare.
    """
    network.to("cpu").eval()
    if isinstance(network, LanguageNetwork):
        return _check_slots(network, folder, batches, tolerance)
    graphs = [(_compared(name, graph, folder), graph) for name, graph in network.graphs().items()]
    samples, largest, disagreements = 0, 0.0, 0
    sizes: set[int] = set()
    lengths: set[int] = set()
    for original, inputs in _with_other_shapes(batches):
        batch = {name: torch.from_numpy(inputs[name]) for name in network.input_names}
        for compare, graph in graphs:
            with torch.no_grad():
                examples = graph.examples(batch)
            for example in examples:
                difference, others = compare(example, tolerance)
                largest, disagreements = max(largest, difference), disagreements + others
        first = inputs[network.input_names[0]]
        samples += len(first) if original else 0
        sizes.add(len(first))
        if "attention_mask" in inputs:
            lengths.add(first.shape[1])
    if samples == 0:
        raise ParityError(NOTHING)
    return Parity(
        samples=samples,
        largest_difference=largest,
        tolerance=tolerance,
        top1_disagreements=disagreements,
        batch_sizes=sorted(sizes),
        lengths=sorted(lengths),
    )


def _check_slots(network: LanguageNetwork, folder: Path, batches: Iterable[Inputs], tolerance: float) -> Parity:
    """The logits of a language model, on whole texts and step by step (`export.slot_parity`)."""
    lengths: list[int] = []
    rows: set[int] = set()
    largest, disagreements = 0.0, 0
    answers = slot_parity.answers(network, folder / "model.onnx", batches)
    while True:
        try:
            found = next(answers, None)
        except Exception as error:  # onnxruntime raises a family of its own, one class for each status
            raise ParityError(f"model.onnx does not run: {error}") from error
        if found is None:
            break
        shape = f"texts of {', '.join(map(str, found.lengths))} tokens, read {found.words}"
        largest = max(largest, _difference("logits", found.expected, found.found, tolerance, shape))
        disagreements += _disagreements(found.expected, found.found, tolerance, shape)
        lengths += found.lengths
        rows |= found.rows
    if not lengths:
        raise ParityError(NOTHING)
    return Parity(
        samples=len(lengths) // 2,  # each is read twice
        largest_difference=largest,
        tolerance=tolerance,
        top1_disagreements=disagreements,
        batch_sizes=sorted(rows),
        lengths=sorted(set(lengths)),
    )


def _compared(
    graph_name: str, graph: Graph, folder: Path
) -> Callable[[Mapping[str, Tensor], float], tuple[float, int]]:
    """A function from inputs of a graph to the largest difference and the number of other winners."""
    session = onnxruntime.InferenceSession(str(folder / f"{graph_name}.onnx"), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]

    def compare(example: Mapping[str, Tensor], tolerance: float) -> tuple[float, int]:
        inputs = {name: example[name].numpy() for name in graph.inputs}
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        shape = f"batch {len(inputs[graph.inputs[0]])} ({shapes})"
        with torch.no_grad():
            answers = graph.module(*(example[name] for name in graph.inputs))
            expected = {name: answers[name].numpy() for name in graph.outputs}
        try:
            found = dict(zip(outputs, session.run(outputs, inputs), strict=True))
        except Exception as error:  # onnxruntime raises a family of its own, one class for each status
            raise ParityError(f"{graph_name}.onnx does not run at {shape}: {error}") from error
        largest = 0.0
        for name in outputs:
            if found[name].shape != expected[name].shape:
                raise ParityError(
                    f"{name} at {shape}: PyTorch answers shape {list(expected[name].shape)}, ONNX Runtime "
                    f"{list(found[name].shape)}; a dynamic dimension was frozen by the export"
                )
            if expected[name].size == 0:
                continue
            largest = max(largest, _difference(name, expected[name], found[name], tolerance, shape))
        others = 0
        for name in [name for name in outputs if name.startswith("logits") and expected[name].shape[1] > 1]:
            others += _disagreements(expected[name], found[name], tolerance, shape)
        return largest, others

    return compare


def _difference(name: str, expected: np.ndarray, found: np.ndarray, tolerance: float, shape: str) -> float:
    """The largest, of whole numbers 0. Raises ParityError for one that is too large."""
    whole = np.issubdtype(expected.dtype, np.integer)
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    allowed = 1.0 if whole else _allowed(expected, tolerance)
    if not difference <= allowed:  # also true of NaN
        raise ParityError(
            f"{name} at {shape}: PyTorch and ONNX Runtime differ by {difference:.2e}, more than {allowed:.0e}"
        )
    return 0.0 if whole else difference


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
        if "attention_mask" in inputs:
            yield False, {name: _longer(value, 5) for name, value in inputs.items()}
            yield False, {name: value[:, :3] for name, value in inputs.items()}


def _longer(value: np.ndarray, steps: int) -> np.ndarray:
    return np.pad(value, [(0, 0), (0, steps), *[(0, 0)] * (value.ndim - 2)])


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
