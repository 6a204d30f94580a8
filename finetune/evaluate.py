"""What a network answers over a whole split, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from export.reports.evaluation import Evaluation
from finetune.batches import evaluation_order
from finetune.objectives.objective import Objective
from finetune.preprocess import Items, tensors
from models.network import Network


@dataclass(frozen=True, kw_only=True)
class Measured:
    """kept: [items, ...] by name, in the order of the items: what the objective's report needs. loss: the objective's
    mean over the items."""

    kept: dict[str, np.ndarray]
    loss: float


def evaluate(
    network: Network, items: Items, objective: Objective, batch_size: int, between: Callable[[], None]
) -> Measured:
    """Run `network` over `items` on the device it is on; it is left in evaluation mode.

    `between` is called before every batch; what it raises ends the evaluation.
    """
    network.eval()
    device = next(network.parameters()).device
    kept: dict[str, list[np.ndarray]] = {}
    total, weight = 0.0, 0.0
    order = evaluation_order(len(items), batch_size, items.lengths)
    for positions in order:
        between()
        targets = torch.from_numpy(items.batch_targets(positions)).to(device)
        with torch.no_grad():
            outputs = objective.outputs(network, tensors(items.batch(positions), device), targets, None)
            total += float(objective.loss(outputs, targets))
            weight += objective.weight(targets)
            for name, value in objective.kept(outputs, targets).items():
                kept.setdefault(name, []).append(value.cpu().numpy())
    back = np.argsort(np.concatenate(order))
    return Measured(kept={name: np.concatenate(parts)[back] for name, parts in kept.items()}, loss=total / weight)


def report(measured: Measured, items: Items, objective: Objective) -> Evaluation:
    """How good that is."""
    return objective.report(measured.kept, items.targets)


def figures(measured: Measured, items: Items, objective: Objective) -> dict[str, float]:
    """The metrics that stopping may watch: "loss", and what the objective names."""
    found = report(measured, items, objective).figures()
    return {"loss": measured.loss, **{name: found[name] for name in objective.metrics}}
