"""Variational autoencoders: the evidence lower bound (Kingma and Welling 2014)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from export.reports import reconstruction
from export.reports.pictures import picture
from export.reports.reconstruction import ReconstructionReport
from finetune import recipe
from finetune.objectives.objective import Objective
from finetune.objectives.reconstruction import reconstructions, spread
from finetune.task import METRICS
from models.network import Network

# Of the numbers that an evaluation draws: all evaluations draw the same.
SEED = 0


class Elbo(Objective):
    """-log p(x | z) + beta · KL(q(z | x) ‖ p(z)) in nats, with one z for each item.

    `error` is that of the mean of q(z | x), which is what is served.
    """

    metrics = METRICS[recipe.Elbo]
    falling = frozenset({"error", "surprise", "kl"})

    def __init__(self, section: recipe.Elbo) -> None:
        self.section = section

    def outputs(
        self, model: nn.Module, inputs: list[Tensor], targets: Tensor, step: int | None
    ) -> Mapping[str, Tensor]:
        if step is not None:
            found: dict[str, Tensor] = model(*inputs, noise=torch.randn_like)
            return found
        generator = torch.Generator().manual_seed(SEED)
        drawn = model(*inputs, noise=lambda mean: torch.randn(mean.shape, generator=generator).to(mean))
        return {**drawn, "error": model(*inputs)["error"]}

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Sum over the batch of `surprise` float32 [batch] and the divergence, float32 scalar."""
        return outputs["surprise"].float().sum() + self.section.beta * divergence(outputs).sum()

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        return {
            "error": outputs["error"].float(),
            "spread": spread(outputs),
            "surprise": outputs["surprise"].float(),
            "kl": divergence(outputs),
        }

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> ReconstructionReport:
        return reconstruction.evaluation(kept["error"], kept["spread"], kept["surprise"], kept["kl"])

    def pictures(self, network: Network, inputs: list[Tensor]) -> dict[str, bytes]:
        """Reconstructions, and what is made of latent vectors that are drawn from the prior."""
        found = reconstructions(network, inputs)
        if not found:
            return {}
        generator = network.graphs()["generator"].module
        with torch.no_grad():
            width = network(*inputs)["embedding"].shape[1]
            latent = torch.randn(4 * len(inputs[0]), width, generator=torch.Generator().manual_seed(SEED))
            images = generator(latent)["image"].numpy()
        rows = {f"samples{' ' * i}": row for i, row in enumerate(np.split(images, 4))}
        return {**found, "samples.png": picture(rows)}


def divergence(outputs: Mapping[str, Tensor]) -> Tensor:
    """KL(q(z | x) ‖ N(0, 1)) = ½ (μ² + σ² - log σ² - 1) of each number of z, float32 [batch, latent]."""
    mean, log_variance = outputs["embedding"].float(), outputs["log_variance"].float()
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1.0)
