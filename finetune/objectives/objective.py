"""Objective: what a network learns, how its loss is summed up, and how good it is found to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from export.reports.evaluation import Evaluation
from finetune.preprocess import Items
from models.network import Network


class Objective:
    """`loss` is a sum over the batch, `weight` what sums of losses are divided by: batches of any sizes, on any number
    of devices, then add up to exactly the mean over all of them.

    metrics: names of figures that stopping may watch beside "loss". falling: those of which less is better.
    keeps_last: whether the weights of the last step are the ones to keep, not those with the lowest loss.
    steps_in_round: in a round of several steps each teaches its own part of the network, the others have no gradient.
    """

    metrics: ClassVar[tuple[str, ...]] = ()
    falling: ClassVar[frozenset[str]] = frozenset()
    keeps_last: ClassVar[bool] = False
    steps_in_round: int = 1

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

    def examined(self, network: Network, items: Items, found: Evaluation, between: Callable[[], None]) -> Evaluation:
        """`found`, with what takes too long for every evaluation in training: of a network that is done, in evaluation
        mode. between: to be called often; what it raises ends the work."""
        return found
