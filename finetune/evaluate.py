"""What a network answers over a whole split, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from export import report
from finetune.batches import evaluation_order
from finetune.objectives.cross_entropy import CrossEntropy
from finetune.preprocess import Items, tensors
from models.network import Network


@dataclass(frozen=True, kw_only=True)
class Measured:
    """logits: float32 [items, classes], in the order of the items. loss: the objective's mean over the items."""

    logits: np.ndarray
    loss: float


def evaluate(
    network: Network, items: Items, objective: CrossEntropy, batch_size: int, between: Callable[[], None]
) -> Measured:
    """Run `network` over `items` on the device it is on; it is left in evaluation mode.

    `between` is called before every batch; what it raises ends the evaluation.
    """
    network.eval()
    device = next(network.parameters()).device
    logits: list[np.ndarray] = []
    total, weight = 0.0, 0.0
    order = evaluation_order(len(items), batch_size, items.lengths)
    for positions in order:
        between()
        targets = torch.from_numpy(items.targets[positions]).to(device)
        with torch.no_grad():
            outputs = network(*tensors(items.batch(positions), device))
            total += float(objective.loss(outputs, targets))
            weight += objective.weight(targets)
        logits.append(outputs["logits"].float().cpu().numpy())
    found = np.empty((len(items), logits[0].shape[1]), np.float32)
    found[np.concatenate(order)] = np.concatenate(logits)
    return Measured(logits=found, loss=total / weight)


def figures(measured: Measured, items: Items) -> dict[str, float]:
    """The metrics that stopping may watch: "loss", "accuracy" and "macro_f1"."""
    labels = [str(i) for i in range(measured.logits.shape[1])]
    evaluation = report.evaluation(measured.logits, items.targets, labels)
    return {"loss": measured.loss, "accuracy": evaluation.accuracy, "macro_f1": evaluation.macro_f1}
