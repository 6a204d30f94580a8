"""The adversarial game (Goodfellow et al. 2014, algorithm 1), one player a step.

Of every k + 1 steps the first k teach the discriminator and the last one the generator. A step leaves the other player
without gradients, so that no optimizer moves it, nor its momentum.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from export.reports import generation
from export.reports.generation import GenerationReport
from finetune import recipe
from finetune.objectives.objective import Objective
from finetune.task import METRICS
from models.gan import Gan, Half


class Adversarial(Objective):
    """Discriminator: -log D(x) - log(1 - D(G(z))), real images labelled 1 - s. Generator: -log D(G(z)), or with
    "minimax" log(1 - D(G(z))), which fades where the discriminator wins."""

    metrics = METRICS[recipe.Adversarial]
    falling = frozenset(metrics)
    keeps_last = True

    def __init__(self, section: recipe.Adversarial) -> None:
        self.section = section
        self.steps_in_round = section.discriminator_steps + 1

    def half(self, step: int) -> Half:
        """Who learns in a step."""
        return "generator" if step % self.steps_in_round == self.section.discriminator_steps else "discriminator"

    def outputs(
        self, model: nn.Module, inputs: list[Tensor], targets: Tensor, step: int | None
    ) -> Mapping[str, Tensor]:
        """As `models.gan.Gan.forward` in a step, as its `compare` in an evaluation."""
        pixels = inputs[0]
        if step is not None:
            logits: dict[str, Tensor] = model(pixels, self.half(step))
            return logits
        assert isinstance(model, Gan), "only a GAN learns by this objective"
        # The same images are always held against the same new ones, in whatever order they come.
        seed = zlib.crc32(pixels.cpu().numpy().tobytes())
        found = model.compare(pixels, torch.Generator(pixels.device).manual_seed(seed))
        return {**found, "fooled": found["generated"]}

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Sum over the batch, float32 scalar: of the player whose logits are there, in an evaluation the mean of both
        over a round."""
        losses = []
        if "real" in outputs:
            losses += [self.discriminator(outputs["real"], outputs["generated"]).sum()]
        if "fooled" in outputs:
            losses += [self.generator(outputs["fooled"]).sum()]
        if len(losses) == 1:
            return losses[0]
        return (self.section.discriminator_steps * losses[0] + losses[1]) / self.steps_in_round

    def discriminator(self, real: Tensor, generated: Tensor) -> Tensor:
        """Of logits float32 [batch] of real and generated images, float32 [batch]."""
        real, generated = real.float(), generated.float()
        # softplus(-x) is -log sigmoid(x), softplus(x) is -log(1 - sigmoid(x)).
        return softplus(-real) + self.section.label_smoothing * real + softplus(generated)

    def generator(self, fooled: Tensor) -> Tensor:
        """Of logits float32 [batch] of generated images, float32 [batch]."""
        logits = fooled.float()
        return softplus(-logits) if self.section.generator_loss == "non_saturating" else -softplus(logits)

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        losses = {
            "discriminator_loss": self.discriminator(outputs["real"], outputs["generated"]),
            "generator_loss": self.generator(outputs["fooled"]),
        }
        return {**losses, **{name: outputs[name] for name in generation.NEEDED}}

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> GenerationReport:
        steps = [self.section.discriminator_steps, 1]
        losses = [kept["discriminator_loss"].mean(), kept["generator_loss"].mean()]
        return generation.evaluation(kept, float(np.average(losses, weights=steps)))
