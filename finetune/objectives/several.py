"""Multi-task learning: several heads on one trunk, each with an objective of its own (Caruana 1997)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from export.bundle import Interval
from export.reports.several import SeveralReport
from finetune.objectives.objective import Objective


@dataclass(frozen=True)
class Part:
    """One head. outputs: names that its objective knows, "logits", "value", ...; the network's end in the head's name.
    columns: of the targets. weight: of its loss in the sum. classes: whether its targets are numbers of classes."""

    objective: Objective
    outputs: tuple[str, ...]
    columns: slice
    weight: float
    classes: bool


class Several(Objective):
    """Σ over the heads of weight · the loss over all items that have a label for it, divided by the number of items: an
    item without one teaches the head nothing, and every label counts as much as any other of its head.

    A head's figures are called "<head>.<figure>".
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = dict(parts)
        self.metrics = tuple(f"{head}.{name}" for head, part in parts.items() for name in part.objective.metrics)
        self.falling = frozenset(f"{head}.{name}" for head, part in parts.items() for name in part.objective.falling)
        self.calibrates = any(part.objective.calibrates for part in parts.values())

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Weighted sum over the batch and the heads; `targets` float32 [batch, columns], NaN where a cell is empty."""
        total = torch.zeros((), device=targets.device)
        for head, part in self.parts.items():
            rows = ~targets[:, part.columns].isnan().all(dim=1)
            own = {name: outputs[f"{name}_{head}"][rows] for name in part.outputs}
            answers = targets[rows, part.columns]
            total = total + part.weight * part.objective.loss(own, answers[:, 0].long() if part.classes else answers)
        return total

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        return {
            f"{name}_{head}": outputs[f"{name}_{head}"].float()
            for head, part in self.parts.items()
            for name in part.outputs
        }

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> SeveralReport:
        heads = {
            head: part.objective.report(*_labelled(head, part, kept, targets)) for head, part in self.parts.items()
        }
        return SeveralReport(samples=len(targets), loss=self.loss_of(kept, targets), heads=heads)

    def calibrate(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> None:
        for head, part in self.parts.items():
            part.objective.calibrate(*_labelled(head, part, kept, targets))

    def intervals(self) -> dict[str, Interval]:
        found = {head: part.objective.intervals() for head, part in self.parts.items()}
        return {head: own[""] for head, own in found.items() if own}


def _labelled(
    head: str, part: Part, kept: dict[str, np.ndarray], targets: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What a head's objective is given: of the items that have a label for it."""
    rows = ~np.isnan(targets[:, part.columns]).all(axis=1)
    answers = targets[rows, part.columns]
    own = {name: kept[f"{name}_{head}"][rows] for name in part.outputs}
    return own, answers[:, 0].astype(np.int64) if part.classes else answers
