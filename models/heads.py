"""Output heads: from a trunk's features to what a task answers. The activation that makes probabilities of logits is
outside the graph: losses are computed from logits, where nothing overflows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.spec import Binary, Classification, Embedding, HeadTask, MultiLabel, MultiTask, Regression, Task

# A deviation is kept between e^-5 and e^5 of the target's own.
MOST_LOG_VARIANCE = 10.0


class Values(nn.Module):
    """Linear units: value = mean + std · (W h + b), with the training targets' mean and deviation.

    spread: a second linear unit for each target learns the logarithm of its variance (Nix and Weigend 1994).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, targets: int, spread: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, targets)
        self.log_variance = nn.Linear(width, targets) if spread else None
        if self.log_variance is not None:
            nn.init.zeros_(self.log_variance.weight)
            nn.init.zeros_(self.log_variance.bias)
        self.register_buffer("mean", torch.zeros(targets))
        self.register_buffer("std", torch.ones(targets))

    def measure(self, targets: Tensor) -> None:
        """Take mean and deviation of `targets` float32 [items, targets]; those that are missing are NaN."""
        self.mean.copy_(targets.nanmean(dim=0))
        deviation = (targets - self.mean).square().nanmean(dim=0).sqrt()
        self.std.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """features float32 [batch, width] → `value`, and `deviation` with a spread: float32 [batch, targets]."""
        value = self.mean + self.std * self.linear(features)
        if self.log_variance is None:
            return {"value": value}
        # Bounded smoothly: behind a hard bound there is no gradient to come back by.
        log_variance = MOST_LOG_VARIANCE * torch.tanh(self.log_variance(features) / MOST_LOG_VARIANCE)
        return {"value": value, "deviation": self.std * torch.exp(0.5 * log_variance)}


def head(task: HeadTask | MultiTask | Embedding, width: int) -> nn.Module | None:
    """The head of `task` on features of length `width`; None for an embedding."""
    match task:
        case MultiTask(heads):
            return nn.ModuleDict({name: _single(one, width) for name, one in heads.items()})
        case Embedding():
            return None
        case _:
            return _single(task, width)


def _single(task: HeadTask, width: int) -> nn.Module:
    match task:
        case Classification(classes):
            return nn.Linear(width, classes)
        case Binary():
            return nn.Linear(width, 1)
        case MultiLabel(labels):
            return nn.Linear(width, labels)
        case Regression(targets, spread):
            return Values(width, targets, spread == "gaussian")


def output_names(task: Task) -> tuple[str, ...]:
    """What a head of `task` puts out, in the graph's order."""
    match task:
        case Classification() | Binary() | MultiLabel():
            return ("logits",)
        case Regression(_, spread):
            return ("value", "deviation") if spread == "gaussian" else ("value",)
        case MultiTask(heads):
            return tuple(f"{output}_{name}" for name, one in heads.items() for output in output_names(one))
    return ()


def answer(module: nn.Module, features: Tensor) -> dict[str, Tensor]:
    """The outputs of a head by name."""
    if isinstance(module, nn.ModuleDict):
        return {
            f"{output}_{name}": value for name, one in module.items() for output, value in answer(one, features).items()
        }
    found = module(features)
    return found if isinstance(found, dict) else {"logits": found}


def measure(module: nn.Module | None, task: Task, targets: Tensor) -> None:
    """Give linear units the scale of the training targets, which stand side by side for several heads."""
    if isinstance(module, Values):
        module.measure(targets)
    elif isinstance(module, nn.ModuleDict) and isinstance(task, MultiTask):
        for name, part in split_targets(task.heads, targets).items():
            measure(module[name], task.heads[name], part)


def split_targets(heads: dict[str, HeadTask], targets: Tensor) -> dict[str, Tensor]:
    """The columns of each head: float32 [items, columns] by name; a class is one column."""
    parts, start = {}, 0
    for name, one in heads.items():
        columns = one.targets if isinstance(one, Regression) else one.labels if isinstance(one, MultiLabel) else 1
        parts[name] = targets[:, start : start + columns]
        start += columns
    return parts
