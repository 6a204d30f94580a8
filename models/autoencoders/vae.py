"""Variational autoencoder: Kingma and Welling 2014 ("Auto-encoding variational Bayes").

The prior of the code z is standard normal, q(z | x) is normal with a mean and a deviation for each of its numbers.
Asked for a supervised task, it is the encoder, whose features are the means, with a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import catalog
from models.autoencoders.coding import Decoder, Encoder, channels, units
from models.autoencoders.units import PixelUnits
from models.network import Graph, Headed, Network, complete
from models.spec import ModelSpec, Reconstruction

# Variances are kept between e^-10 and e^10.
MOST_LOG_VARIANCE = 10.0
# Of z at first: with as much noise as the prior has, a decoder would learn to do without z.
FIRST_LOG_VARIANCE = -3.0
# A pixel that is never lit is taken to be so with this chance before z is known.
LEAST_CHANCE = 0.01
# Latent vectors that the exported generator is compared on, beside those of the data.
SEED = 0


class Bernoulli(nn.Module):
    """p(x | z) of pixels: each intensity from 0 to 1 is the chance of being lit.

    decoded: float32 [batch, 3, size, size], what z adds to the log odds of the mean image. centre: that image, which x
    is less than the intensities.
    """

    def expected(self, decoded: Tensor, centre: Tensor) -> Tensor:
        """The mean of x given z."""
        return torch.sigmoid(self._log_odds(decoded, centre)) - centre

    def surprise(self, decoded: Tensor, x: Tensor, centre: Tensor) -> Tensor:
        """-log p(x | z) in nats, float32 [batch]."""
        logits = self._log_odds(decoded, centre)
        losses = functional.binary_cross_entropy_with_logits(logits, x + centre, reduction="none")
        return losses.flatten(1).sum(dim=1)

    def _log_odds(self, decoded: Tensor, centre: Tensor) -> Tensor:
        inside = centre.clamp(LEAST_CHANCE, 1.0 - LEAST_CHANCE)
        return decoded + torch.log(inside / (1.0 - inside))


class Gaussian(nn.Module):
    """p(x | z) of vectors: normal around what is decoded, with one deviation for all standardized numbers, which is
    learned (Rybkin, Daniilidis and Levine 2021). decoded: float32 [batch, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(1))

    def expected(self, decoded: Tensor, centre: Tensor) -> Tensor:
        """The mean of x given z."""
        return decoded

    def surprise(self, decoded: Tensor, x: Tensor, centre: Tensor) -> Tensor:
        """-log p(x | z) in nats, float32 [batch]."""
        log_variance = self.log_variance.clamp(-MOST_LOG_VARIANCE, MOST_LOG_VARIANCE)
        squares = (x - decoded).square() * torch.exp(-log_variance)
        return 0.5 * (squares + log_variance + math.log(2.0 * math.pi)).sum(dim=1)


class Generator(nn.Module):
    """latent float32 [batch, latent], standard normal → `image` uint8 [batch, size, size, 3] or `vector` float32
    [batch, features], the mean of p(x | z)."""

    def __init__(self, network: Vae) -> None:
        super().__init__()
        self.decoder, self.likelihood, self.units = network.decoder, network.likelihood, network.trunk.units
        self.output = "image" if isinstance(self.units, PixelUnits) else "vector"

    def forward(self, latent: Tensor) -> dict[str, Tensor]:
        return {self.output: self.units.back(self.likelihood.expected(self.decoder(latent), self.units.mean))}


class Vae(Network):
    """The encoder of the means is the trunk, as that of a network with a head, which can go on from its weights."""

    output_names = ("reconstruction", "error", "embedding")

    def __init__(self, spec: ModelSpec, trunk: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.spec = spec
        self.trunk = trunk
        self.log_variance = nn.Linear(trunk.features_width, trunk.width)
        nn.init.zeros_(self.log_variance.weight)
        nn.init.constant_(self.log_variance.bias, FIRST_LOG_VARIANCE)
        self.decoder = decoder
        self.likelihood = Bernoulli() if isinstance(trunk.units, PixelUnits) else Gaussian()
        self.input_names = trunk.input_names

    def blocks(self) -> list[tuple[str, nn.Module]]:
        blocks = [*self.trunk.blocks(), ("log_variance", self.log_variance), *self.decoder.blocks()]
        return blocks if isinstance(self.likelihood, Bernoulli) else [*blocks, ("likelihood", self.likelihood)]

    def measure(self, inputs: Callable[[], list[Tensor]], targets: Tensor) -> None:
        self.trunk.measure(inputs)

    def graphs(self) -> dict[str, Graph]:
        """`generator` beside what reconstructs."""
        made = Generator(self)
        return {
            **super().graphs(),
            "generator": Graph(made, ("latent",), (made.output,), {}, self._latents),
        }

    def _latents(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The codes of a batch, and as many from the prior."""
        codes = self(*(batch[name] for name in self.input_names))["embedding"]
        drawn = torch.randn(codes.shape, generator=torch.Generator().manual_seed(SEED))
        return [{"latent": codes}, {"latent": drawn}]

    def forward(self, raw: Tensor, noise: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """raw: a batch of inputs. noise: standard normal numbers of a tensor's shape; None: z is the mean of
        q(z | x), always the same.

        `reconstruction` as the input, uint8 for pixels; `error` float32 [batch], the mean squared error in the inputs'
        units; `embedding` and `log_variance` float32 [batch, latent], of q(z | x); `surprise` float32 [batch],
        -log p(x | z) in nats; `clean`: the inputs in their units.
        """
        clean = self.trunk.units(raw)
        features = self.trunk.features(clean)
        mean = self.trunk.code(features)
        log_variance = self.log_variance(features).clamp(-MOST_LOG_VARIANCE, MOST_LOG_VARIANCE)
        # Reparametrized: z is a function of mean and deviation, and so has a gradient by them.
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise(mean)
        decoded = self.decoder(z)
        centre = self.trunk.units.mean
        expected = self.likelihood.expected(decoded, centre)
        return {
            "reconstruction": self.trunk.units.back(expected),
            "error": (expected - clean).square().flatten(1).mean(dim=1),
            "embedding": mean,
            "log_variance": log_variance,
            "surprise": self.likelihood.surprise(decoded, clean, centre),
            "clean": clean,
        }


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when what the network reads is still open."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.VaeParameters)
    read, stages = units(spec.architecture, parameters), channels(spec.architecture, parameters)
    trunk = Encoder(read, stages, parameters.hidden, parameters.latent, parameters.activation, "linear")
    if not isinstance(complete(spec), Reconstruction):
        return Headed(spec, trunk, parameters.dropout)
    return Vae(spec, trunk, Decoder(read.shape, stages, parameters.hidden, parameters.latent, parameters.activation))
