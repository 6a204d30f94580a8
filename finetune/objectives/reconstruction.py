"""Autoencoders: an input from its code, with whatever keeps the code from being a mere copy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from export.reports import reconstruction
from export.reports.pictures import picture
from export.reports.reconstruction import ReconstructionReport
from finetune import recipe
from finetune.objectives.objective import Objective
from finetune.task import METRICS
from models.network import Network

# A unit that is always off or always on is taken to be so close to it.
CLOSE = 1e-6


class Reconstruction(Objective):
    """Mean squared error, and what the recipe asks for: corrupted inputs (in training only), a sparse code, a
    contracting encoder. An evaluation counts the penalties, too, and corrupts nothing."""

    metrics = METRICS[recipe.Reconstruction]
    falling = frozenset({"error"})

    def __init__(self, section: recipe.Reconstruction) -> None:
        self.section = section

    def outputs(
        self, model: nn.Module, inputs: list[Tensor], targets: Tensor, step: int | None
    ) -> Mapping[str, Tensor]:
        if self.section.contraction == 0.0:
            found: dict[str, Tensor] = model(*inputs, change=None if step is None else self.corrupt)
            return found
        with torch.enable_grad():  # an evaluation has none
            found = model(*inputs, change=lambda x: (x if step is None else self.corrupt(x)).requires_grad_())
            norms = jacobian_norms(found["embedding"], found["changed"], learning=step is not None)
        return {**found, "contraction": norms}

    def corrupt(self, x: Tensor) -> Tensor:
        """Inputs in their units with Gaussian noise, and a share of their numbers at the mean (Vincent et al. 2008)."""
        if self.section.noise:
            x = x + self.section.noise * torch.randn_like(x)
        if self.section.masking:
            x = x * (torch.rand_like(x) >= self.section.masking)
        return x

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Sum over the batch of `error` float32 [batch] and the penalties, float32 scalar."""
        total = outputs["error"].float().sum()
        code = outputs["embedding"].float()
        match self.section.sparsity:
            case recipe.L1Sparsity(weight=weight):
                total = total + weight * code.abs().sum()
            case recipe.KlSparsity(weight=weight, activation=target):
                total = total + weight * len(code) * activation_divergence(code.mean(dim=0), target)
        if "contraction" in outputs:
            total = total + self.section.contraction * outputs["contraction"].sum()
        return total

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        return {"error": outputs["error"].detach().float(), "spread": spread(outputs)}

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> ReconstructionReport:
        return reconstruction.evaluation(kept["error"], kept["spread"])

    def pictures(self, network: Network, inputs: list[Tensor]) -> dict[str, bytes]:
        return reconstructions(network, inputs)


def activation_divergence(mean: Tensor, target: float) -> Tensor:
    """Σ_j KL(target ‖ mean_j) of units that are on a share mean_j, float32 [code], of the time (Ng 2011)."""
    mean = mean.clamp(CLOSE, 1.0 - CLOSE)
    on, off = target * (math.log(target) - mean.log()), (1.0 - target) * (math.log(1.0 - target) - (1.0 - mean).log())
    return (on + off).sum()


def jacobian_norms(code: Tensor, x: Tensor, learning: bool) -> Tensor:
    """‖∂code/∂x‖² (Frobenius) of each item, float32 [batch]; exact for every encoder that codes each item by itself.

    code: float32 [batch, code], computed from x float32 [batch, ...]. learning: whether it is to have a gradient.
    """
    each = torch.eye(code.shape[1], device=code.device, dtype=code.dtype)
    (rows,) = torch.autograd.grad(
        code, x, each.unsqueeze(1).expand(-1, len(code), -1), create_graph=learning, is_grads_batched=True
    )
    return rows.float().square().flatten(2).sum(dim=(0, 2))


def spread(outputs: Mapping[str, Tensor]) -> Tensor:
    """Mean square of each input less the training data's mean, float32 [batch]."""
    return outputs["clean"].detach().float().square().flatten(1).mean(dim=1)


def reconstructions(network: Network, inputs: list[Tensor]) -> dict[str, bytes]:
    """Images above what comes back of them; nothing for vectors."""
    if network.input_names != ("pixels",):
        return {}
    with torch.no_grad():
        found = network(*inputs)["reconstruction"].numpy()
    return {"reconstructions.png": picture({"original": inputs[0].numpy(), "again": found})}
