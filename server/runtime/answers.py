"""What a model can be asked for: which outputs of its graph that takes, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from export.bundle import GraphSpec, Interval, Manifest
from export.processing.answers import probabilities

# One value a row: an array whose first axis is the rows, or a list.
Rows = np.ndarray | Sequence[Any]

RECONSTRUCTED = ("reconstruction", "error", "embedding")


class Unsure(NamedTuple):
    """One row of an answer by several networks, and how far they are apart: float32 [], of numbers [targets]."""

    answer: np.ndarray
    uncertainty: np.ndarray


@dataclass(frozen=True)
class Answer:
    """outputs: of the graph. make: from a batch of them by name to one value a row."""

    outputs: tuple[str, ...]
    make: Callable[[Mapping[str, np.ndarray]], Rows]


@dataclass(frozen=True)
class Generator:
    """The graph of a model that makes images: `graph`.onnx takes `latent` numbers for each of height × width pixels."""

    graph: str
    latent: int
    height: int
    width: int


def generator(manifest: Manifest) -> Generator | None:
    """That of a model which has one: takes `latent` and nothing else, gives `image`."""
    main = GraphSpec(inputs=manifest.inputs, outputs=manifest.outputs)
    for name, graph in {"model": main, **manifest.graphs}.items():
        image = next((output for output in graph.outputs if output.name == "image"), None)
        if image is None or [tensor.name for tensor in graph.inputs] != ["latent"]:
            continue
        latent, height, width = graph.inputs[0].shape[-1], *image.shape[1:3]
        if isinstance(latent, int) and isinstance(height, int) and isinstance(width, int):
            return Generator(name, latent, height, width)
    return None


def answers(manifest: Manifest) -> dict[str, Answer]:
    """By name, the answers of a model.

    classify: probabilities float32 [labels]. embedding: features float32 [width]. predict: of a regression float32 [1,
    targets] of the values, or [3, targets] of values and the ends of their intervals; of several heads all of these by
    the name of the head; of an autoencoder the reconstruction, the error and the embedding by these names. generate:
    images uint8 [height, width, 3]. Where the graph has an output "uncertainty", rows are `Unsure`.
    """
    found: dict[str, Answer] = {}
    unsure = tuple(output.name for output in manifest.outputs if output.name == "uncertainty")
    match manifest.task:
        case "classification" | "binary" | "multi_label":
            found["classify"] = Answer(("logits", *unsure), lambda outputs: _head(manifest.task, outputs, "", None))
        case "regression":
            names = tuple(output.name for output in manifest.outputs if output.name in ("value", "deviation"))
            found["predict"] = Answer(
                (*names, *unsure), lambda outputs: _head("regression", outputs, "", manifest.interval)
            )
        case "multi_task":
            names = tuple(output.name for output in manifest.outputs if output.name != "embedding")
            found["predict"] = Answer(names, lambda outputs: _heads(manifest, outputs))
        case "reconstruction":
            found["predict"] = Answer(RECONSTRUCTED, _reconstructed)
        case "generation":
            found["generate"] = Answer(("image",), lambda outputs: outputs["image"])
    if any(output.name == "embedding" for output in manifest.outputs):
        found["embedding"] = Answer(("embedding",), lambda outputs: outputs["embedding"])
    return found


def _reconstructed(outputs: Mapping[str, np.ndarray]) -> Rows:
    """One dict a row."""
    columns = [outputs[name] for name in RECONSTRUCTED]
    return [dict(zip(RECONSTRUCTED, row, strict=True)) for row in zip(*columns, strict=True)]


def _heads(manifest: Manifest, outputs: Mapping[str, np.ndarray]) -> Rows:
    """One dict a row."""
    found = {name: _head(head.task, outputs, f"_{name}", head.interval) for name, head in manifest.heads.items()}
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def _head(task: str, outputs: Mapping[str, np.ndarray], suffix: str, interval: Interval | None) -> Rows:
    """Of the outputs whose names end in `suffix`: probabilities [batch, labels] or numbers [batch, 1 or 3, targets]."""
    found = _answered(task, outputs, suffix, interval)
    uncertainty = outputs.get(f"uncertainty{suffix}")
    return found if uncertainty is None else [Unsure(*row) for row in zip(found, uncertainty, strict=True)]


def _answered(task: str, outputs: Mapping[str, np.ndarray], suffix: str, interval: Interval | None) -> np.ndarray:
    if task != "regression":
        return probabilities(task, outputs[f"logits{suffix}"])
    value = outputs[f"value{suffix}"]
    if interval is None:
        return value[:, None]
    margin = np.array(interval.margins, np.float32)
    if interval.method == "gaussian":
        margin = margin * outputs[f"deviation{suffix}"]
    return np.stack([value, value - margin, value + margin], axis=1)
