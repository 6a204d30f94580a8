"""Any number of labels at once: a sigmoid and a binary cross-entropy for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor
from torch.nn.functional import softplus

from export.reports import multi_label
from export.reports.multi_label import MultiLabelReport
from finetune import recipe
from finetune.objectives.objective import Objective
from finetune.task import METRICS


class MultiLabel(Objective):
    """The mean over the labels of softplus(x) - y · x, which is the binary cross-entropy of logit x and y, 0 or 1."""

    metrics = METRICS[recipe.MultiLabel]

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Sum over the batch of `outputs["logits"]` [batch, labels] against `targets` float32 of the same shape."""
        logits = outputs["logits"].float()
        return (softplus(logits) - targets * logits).mean(dim=1).sum()

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        return {"logits": outputs["logits"].float()}

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> MultiLabelReport:
        return multi_label.evaluation(kept["logits"], targets, self.labels)
