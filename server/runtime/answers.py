"""What a model can be asked for: which outputs of its graph that takes, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.bundle import Manifest
from export.processing.answers import softmax

# One value a row: an array whose first axis is the rows, or a list.
Rows = np.ndarray | Sequence[Any]


@dataclass(frozen=True)
class Answer:
    """outputs: of the graph. make: from a batch of them by name to one value a row."""

    outputs: tuple[str, ...]
    make: Callable[[Mapping[str, np.ndarray]], Rows]


def answers(manifest: Manifest) -> dict[str, Answer]:
    """By name, the answers of a model: "classify" gives probabilities float32 [labels], "embedding" features float32
    [width]."""
    found: dict[str, Answer] = {}
    match manifest.task:
        case "classification":
            found["classify"] = Answer(("logits",), lambda outputs: softmax(outputs["logits"]))
    if any(output.name == "embedding" for output in manifest.outputs):
        found["embedding"] = Answer(("embedding",), lambda outputs: outputs["embedding"])
    return found
