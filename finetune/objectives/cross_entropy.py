"""Softmax cross-entropy with label smoothing and class weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from finetune import recipe


class CrossEntropy:
    """-Σ_k q_k log p_k with q = (1 - s) one-hot + s / classes (Szegedy et al. 2016), times the weight of the target.

    An objective answers `loss`, a sum over the batch, and `weight`, what sums of losses are divided by. Batches of
    any sizes, on any number of devices, then add up to exactly the mean over all of them.
    """

    def __init__(self, classes: int, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        """class_weights: float32 [classes], or None for 1 each."""
        self.label_smoothing = label_smoothing
        self.class_weights = torch.ones(classes) if class_weights is None else class_weights

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Weighted sum, float32 scalar, of `outputs["logits"]` [batch, classes] against `targets` int64 [batch]."""
        losses = nn.functional.cross_entropy(
            outputs["logits"].float(), targets, reduction="none", label_smoothing=self.label_smoothing
        )
        return (losses * self.class_weights.to(losses.device)[targets]).sum()

    def weight(self, targets: Tensor) -> float:
        """Sum of the weights of `targets` int64 [items]."""
        return float(self.class_weights.to(targets.device)[targets].sum())


def class_weights(section: recipe.CrossEntropy, labels: Sequence[str], targets: np.ndarray) -> Tensor | None:
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


def build(section: recipe.CrossEntropy, labels: Sequence[str], targets: np.ndarray) -> CrossEntropy:
    """The objective of a recipe for these labels and training targets. Raises ValueError as `class_weights` does."""
    return CrossEntropy(len(labels), section.label_smoothing, class_weights(section, labels, targets))
