"""Cross-entropy of two classes from one logit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor
from torch.nn.functional import softplus

from export.reports import binary
from export.reports.binary import BinaryReport
from finetune import recipe
from finetune.objectives.objective import Objective
from finetune.task import METRICS


class BinaryCrossEntropy(Objective):
    """w · y · softplus(-x) + (1 - y) · softplus(x) of a logit x and a class y, 0 or 1: what -log of the sigmoid is,
    without a sigmoid that could round to 0 (Goodfellow, Bengio and Courville 2016, section 6.2.2.2).

    positive_weight: w.
    """

    metrics = METRICS[recipe.BinaryCrossEntropy]

    def __init__(self, positive_weight: float = 1.0, labels: Sequence[str] = ("0", "1")) -> None:
        self.positive_weight = positive_weight
        self.labels = list(labels)

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Weighted sum, float32 scalar, of `outputs["logits"]` [batch, 1] against `targets` [batch] of 0 and 1."""
        logits, positive = outputs["logits"].float().squeeze(1), targets.float()
        missed = self.positive_weight * positive * softplus(-logits)
        return (missed + (1.0 - positive) * softplus(logits)).sum()

    def weight(self, targets: Tensor) -> float:
        """Sum of the weights of `targets` [items]."""
        return len(targets) + (self.positive_weight - 1.0) * float(targets.sum())

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        return {"logits": outputs["logits"].float()}

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> BinaryReport:
        return binary.evaluation(kept["logits"][:, 0], targets, self.labels)
