"""Objective: what a network learns, how its loss is summed up, and how good it is found to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from export.bundle import Interval
from export.reports.evaluation import Evaluation
from finetune.preprocess import Items
from models.network import Network


class Objective:
    """`loss` is a sum over the batch, `weight` what sums of losses are divided by: batches of any sizes, on any number
    of devices, then add up to exactly the mean over all of them.

    metrics: names of figures that stopping may watch beside "loss". falling: those of which less is better.
    keeps_last: whether the weights of the last step are the ones to keep, not those with the lowest loss.
    steps_in_round: in a round of several steps each teaches its own part of the network, the others have no gradient.
    calibrates: whether `calibrate` has something to take from a split that was not learned from.
    packs: whether it lays texts of a batch into common rows, so that those of one need not be alike in length.
    compares: whether `compared` tells how good a network was before it learned.
    """

    metrics: tuple[str, ...] = ()
    falling: frozenset[str] = frozenset()
    keeps_last: bool = False
    steps_in_round: int = 1
    calibrates: bool = False
    packs: bool = False
    compares: bool = False

    def outputs(
        self, model: nn.Module, inputs: list[Tensor], targets: Tensor, step: int | None
    ) -> Mapping[str, Tensor]:
        """What the loss is computed from. step: of training, from 0; None in an evaluation."""
        found: Mapping[str, Tensor] = model(*inputs)
        return found

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Weighted sum over the batch, float32 scalar."""
        raise NotImplementedError

    def weight(self, targets: Tensor) -> float:
        """Sum of the weights of `targets` [items, ...]."""
        return float(len(targets))

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """What `report` needs of each item: [batch, ...] by name."""
        raise NotImplementedError

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> Evaluation:
        """How good the network is on a whole split."""
        raise NotImplementedError

    def pictures(self, network: Network, inputs: list[Tensor]) -> dict[str, bytes]:
        """PNG files of what the network makes of some held-out inputs, by name, for the bundle. On the CPU, in
        evaluation mode."""
        return {}

    def loss_of(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> float:
        """The mean loss of a whole split, where what is kept is what the loss is computed from."""
        answers = torch.from_numpy(targets)
        total = self.loss({name: torch.from_numpy(value) for name, value in kept.items()}, answers)
        return float(total) / self.weight(answers)

    def calibrate(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> None:
        """Learn from items that were not learned from how far answers are to be trusted; reports from now on say how
        well that holds."""

    def intervals(self) -> dict[str, Interval]:
        """Of numbers, by the name of the head, which is "" where there is only one."""
        return {}

    def compared(self, found: Evaluation, before: Evaluation) -> tuple[Evaluation, str]:
        """`found`, with how good the network was on the same items before it learned, and that in a sentence."""
        raise NotImplementedError

    def examined(self, network: Network, items: Items, found: Evaluation, between: Callable[[], None]) -> Evaluation:
        """`found`, with what takes too long for every evaluation in training: of a network that is done, in evaluation
        mode. between: to be called often; what it raises ends the work."""
        return found
