"""Numbers: by squared errors their mean is learned, by absolute errors their median, by the likelihood of a normal
distribution their mean and their deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from export.bundle import Interval
from export.reports import regression
from export.reports.regression import RegressionReport
from finetune import recipe
from finetune.objectives import conformal
from finetune.objectives.objective import Objective
from finetune.task import METRICS

# So many deviations around the mean of a normal distribution hold 95 in 100.
NORMAL_MARGIN = 1.959964


class Numbers(Objective):
    """The mean over the targets of a loss of z = (value - truth) / scale, so that no target counts more for its unit.

    scale: float32 [targets], the deviations of the training targets. A truth that is NaN teaches nothing.
    """

    metrics = METRICS[recipe.SquaredError]
    falling = frozenset({"mae", "rmse"})
    calibrates = True

    def __init__(self, scale: Tensor, names: Sequence[str] = ()) -> None:
        self.scale = scale
        self.names = list(names) or [str(i) for i in range(len(scale))]
        self.interval: Interval | None = None

    def losses(self, errors: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        """[batch, targets] from `errors` z of the same shape."""
        raise NotImplementedError

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Sum over the batch of `outputs["value"]` [batch, targets] against `targets` float32 of the same shape."""
        there = ~targets.isnan()
        values = outputs["value"].float()
        errors = (values - torch.where(there, targets, values.detach())) / self.scale.to(values.device)
        return (self.losses(errors, outputs) * there).mean(dim=1).sum()

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        return {name: outputs[name].float() for name in ("value", "deviation") if name in outputs}

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> RegressionReport:
        return regression.evaluation(
            kept["value"], targets, self.names, self.loss_of(kept, targets), self.interval, kept.get("deviation")
        )

    def calibrate(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> None:
        margins = conformal.margins(kept["value"], targets)
        if margins is not None:
            self.interval = Interval(method="conformal", coverage=conformal.COVERAGE, margins=margins)

    def intervals(self) -> dict[str, Interval]:
        return {} if self.interval is None else {"": self.interval}


class SquaredError(Numbers):
    """z²: the value that is best on average is the mean."""

    def losses(self, errors: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        return errors.square()


class AbsoluteError(Numbers):
    """|z|: the value that is best on average is the median."""

    def losses(self, errors: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        return errors.abs()


class Gaussian(Numbers):
    """½ (z / s)² + log s + ½ log 2π, the negative log-likelihood in nats, with the answered deviation s, in the scale
    of z (Nix and Weigend 1994)."""

    calibrates = False

    def __init__(self, scale: Tensor, names: Sequence[str] = ()) -> None:
        super().__init__(scale, names)
        self.interval = Interval(
            method="gaussian", coverage=conformal.COVERAGE, margins=[NORMAL_MARGIN] * len(self.names)
        )

    def losses(self, errors: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        spread = outputs["deviation"].float() / self.scale.to(errors.device)
        return 0.5 * (errors / spread).square() + spread.log() + 0.5 * math.log(2.0 * math.pi)


def scale_of(targets: np.ndarray) -> Tensor:
    """Deviations of `targets` float32 [items, targets], NaN where one is missing; 1 where all are equal."""
    deviation = np.nanstd(targets.astype(np.float64), axis=0)
    return torch.tensor(np.where(deviation > 1e-6, deviation, 1.0), dtype=torch.float32)
