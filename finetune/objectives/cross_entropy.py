"""Softmax cross-entropy and KL divergence, with label smoothing and class weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from export.reports import classification
from export.reports.classification import ClassificationReport
from finetune import recipe
from finetune.objectives.objective import Objective
from finetune.task import METRICS


class CrossEntropy(Objective):
    """-Σ_k q_k log p_k with q = (1 - s) one-hot + s / classes (Szegedy et al. 2016), times the weight of the target.

    divergence: less the entropy of q, which makes it KL(q ‖ p).
    """

    metrics = METRICS[recipe.CrossEntropy]

    def __init__(
        self,
        classes: int,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        *,
        divergence: bool = False,
        labels: Sequence[str] = (),
    ) -> None:
        """class_weights: float32 [classes], or None for 1 each. labels: of the report, else the numbers."""
        self.label_smoothing = label_smoothing
        self.class_weights = torch.ones(classes) if class_weights is None else class_weights
        self.labels = list(labels) or [str(i) for i in range(classes)]
        rest = label_smoothing / classes
        smoothed = [1.0 - label_smoothing + rest, *[rest] * (classes - 1)]
        self.entropy = -sum(q * math.log(q) for q in smoothed if q > 0.0) if divergence else 0.0

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Weighted sum, float32 scalar, of `outputs["logits"]` [batch, classes] against `targets` int64 [batch]."""
        losses = nn.functional.cross_entropy(
            outputs["logits"].float(), targets, reduction="none", label_smoothing=self.label_smoothing
        )
        return ((losses - self.entropy) * self.class_weights.to(losses.device)[targets]).sum()

    def weight(self, targets: Tensor) -> float:
        """Sum of the weights of `targets` int64 [items]."""
        return float(self.class_weights.to(targets.device)[targets].sum())

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        return {"logits": outputs["logits"].float()}

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> ClassificationReport:
        return classification.evaluation(kept["logits"], targets, self.labels)


def class_weights(
    section: recipe.CrossEntropy | recipe.KlDivergence, labels: Sequence[str], targets: np.ndarray
) -> Tensor | None:
    """Float32 [classes] as the recipe asks, counted on the training targets int64 [items]; None when all are 1.

    "balanced" is items / (classes · n_c), 0 for a class without items; a label that a mapping leaves out weighs 1.
    Raises ValueError naming a label that the data lack.
    """
    if section.class_weights is None:
        return None
    if section.class_weights == "balanced":
        counts = np.bincount(targets, minlength=len(labels))
        weights = np.where(counts > 0, len(targets) / (len(labels) * np.maximum(counts, 1)), 0.0)
        return torch.tensor(weights, dtype=torch.float32)
    unknown = sorted(set(section.class_weights) - set(labels))
    if unknown:
        raise ValueError(f"objective.class_weights: the data have no label {unknown[0]!r}; labels: {', '.join(labels)}")
    return torch.tensor([section.class_weights.get(label, 1.0) for label in labels], dtype=torch.float32)


def build(
    section: recipe.CrossEntropy | recipe.KlDivergence, labels: Sequence[str], targets: np.ndarray
) -> CrossEntropy:
    """The objective of a recipe for these labels and training targets. Raises ValueError as `class_weights` does."""
    return CrossEntropy(
        len(labels),
        section.label_smoothing,
        class_weights(section, labels, targets),
        divergence=isinstance(section, recipe.KlDivergence),
        labels=labels,
    )
