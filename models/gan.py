"""Generative adversarial networks: a generator makes images from noise, a discriminator tells them from real ones.

"dense": Goodfellow et al. 2014 ("Generative adversarial nets"): ReLU against maxout with dropout.
"convolutional": Radford, Metz and Chintala 2016 (DCGAN): strided convolutions instead of pooling, batch norm
everywhere but at the images, ReLU against LeakyReLU of slope 0.2, weights from N(0, 0.02).
The discriminator stays with the weights, so that the game can go on; the exported graph is the generator's alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models import catalog
from models.hidden import Dense, Maxout
from models.image_space import ImageSpace
from models.network import Graph, Network, Normalize, complete
from models.spec import Generation, ModelSpec, tag

Half = Literal["discriminator", "generator"]

SLOPE = 0.2
DEVIATION = 0.02
# A stride of 2 divides it: every pixel that a transposed convolution writes gets as much as its neighbours.
KERNEL = 4
# Sides below 8 are not halved any more; channels grow to this many times the width.
SMALLEST = 8
MOST_WIDTHS = 8
# Of dense layers, in widths; and affine maps of a maxout unit (the paper's).
DENSE_WIDTHS = 8
PIECES = 5
# The latent vectors that the exported graph is compared on.
EXAMPLE_SEED = 0


class Gan(Network):
    """Learns from pixels uint8 [batch, size, size, 3]; its graph takes latent float32 [batch, latent]."""

    input_names = ("pixels",)
    output_names = ("image",)

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        task = complete(spec)
        if not isinstance(task, Generation):
            raise ValueError(f"{spec.architecture} has no way to do the task {tag(task)}")
        parameters = catalog.hyperparameters(spec)
        assert isinstance(parameters, catalog.GanParameters)
        self.latent = parameters.latent
        self.normalize = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        build = dense if parameters.layers == "dense" else convolutional
        self.generator, self.discriminator = build(parameters)
        self.space = ImageSpace(parameters.image_size)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """From the latent vector to the image, and from the image to its logit."""
        halves: list[tuple[Half, nn.Sequential]] = [
            ("generator", self.generator),
            ("discriminator", self.discriminator),
        ]
        return [(f"{name}.{layer}", block) for name, half in halves for layer, block in half.named_children()]

    def measure(self, inputs: Callable[[], list[Tensor]], targets: Tensor) -> None:
        self.space.measure(self.normalize(inputs()[0]))

    def graphs(self) -> dict[str, Graph]:
        return {"model": Graph(Sampler(self.generator), ("latent",), ("image",), {}, self._examples)}

    def forward(self, pixels: Tensor, learns: Half) -> dict[str, Tensor]:
        """Logits float32 [batch] of the half that `learns`, the other one being a fixed function.

        The discriminator's: `real` of the pixels and `generated` of as many new images. The generator's: `fooled`, the
        discriminator's of new images.
        """
        latent = torch.randn(len(pixels), self.latent, device=pixels.device)
        if learns == "generator":
            return {"fooled": fixed(self.discriminator, self.generator(latent)).squeeze(1)}
        with torch.no_grad():
            images = fixed(self.generator, latent)
        # Each set by itself, so that batch norm sees one kind of image at a time.
        real, generated = self.discriminator(self.normalize(pixels)), self.discriminator(images)
        return {"real": real.squeeze(1), "generated": generated.squeeze(1)}

    def compare(self, pixels: Tensor, random: torch.Generator) -> dict[str, Tensor]:
        """As many new images as there are real ones, and what tells the two sets apart, in evaluation mode.

        `real`, `generated`: logits float32 [batch]; `real_features`, `generated_features`, `independent_features`:
        float32 [batch, 32] in the space of the training images, the last of images whose pixels are drawn each by
        itself; `image` uint8 [batch, size, size, 3].
        """
        real = self.normalize(pixels)
        images = self.generator(torch.randn(len(pixels), self.latent, generator=random, device=pixels.device))
        noise = torch.randn(len(pixels), self.space.pixels, generator=random, device=pixels.device)
        return {
            "real": self.discriminator(real).squeeze(1),
            "generated": self.discriminator(images).squeeze(1),
            "real_features": self.space(real),
            "generated_features": self.space(images),
            "independent_features": self.space.independent_pixels(noise),
            "image": to_pixels(images),
        }

    def _examples(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        random = torch.Generator().manual_seed(EXAMPLE_SEED)
        return [{"latent": torch.randn(len(batch["pixels"]), self.latent, generator=random)}]


class Sampler(nn.Module):
    """latent float32 [batch, latent] → `image` uint8 [batch, size, size, 3]."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, latent: Tensor) -> dict[str, Tensor]:
        return {"image": to_pixels(self.generator(latent))}


def to_pixels(images: Tensor) -> Tensor:
    """-1..1 float32 [batch, 3, height, width] → uint8 [batch, height, width, 3]."""
    return ((images.permute(0, 2, 3, 1) + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)


def fixed(half: nn.Module, inputs: Tensor) -> Tensor:
    """What `half` makes of its inputs as a function of nothing else: its parameters get no gradient, and the running
    statistics of its batch norms stay what they are."""
    state = {name: parameter.detach() for name, parameter in half.named_parameters()}
    outputs: Tensor = functional_call(half, {**state, **{name: b.clone() for name, b in half.named_buffers()}}, inputs)
    return outputs


def dense(parameters: catalog.GanParameters) -> tuple[nn.Sequential, nn.Sequential]:
    """Generator and discriminator of dense layers, two hidden ones each."""
    units, size = DENSE_WIDTHS * parameters.width, parameters.image_size
    values = 3 * size * size
    out = nn.Linear(units, values)
    nn.init.xavier_normal_(out.weight)
    generator = nn.Sequential(
        OrderedDict(
            hidden0=Dense(parameters.latent, units, "relu", 0.0),
            hidden1=Dense(units, units, "relu", 0.0),
            image=nn.Sequential(out, nn.Tanh(), nn.Unflatten(1, (3, size, size))),
        )
    )
    discriminator = nn.Sequential(
        OrderedDict(
            hidden0=nn.Sequential(nn.Flatten(), Maxout(values, units, PIECES, 0.0), nn.Dropout(parameters.dropout)),
            hidden1=nn.Sequential(Maxout(units, units, PIECES, 0.0), nn.Dropout(parameters.dropout)),
            logit=nn.Linear(units, 1),
        )
    )
    return generator, discriminator


def convolutional(parameters: catalog.GanParameters) -> tuple[nn.Sequential, nn.Sequential]:
    """Generator and discriminator of strided convolutions, one the mirror of the other."""
    sides = list(halved(parameters.image_size))
    widths = [parameters.width * min(2**i, MOST_WIDTHS) for i in range(len(sides) - 1)]
    channels = [3, *widths]
    deepest = channels[-1] * sides[-1] ** 2
    up: OrderedDict[str, nn.Module] = OrderedDict(
        latent=nn.Sequential(
            nn.Linear(parameters.latent, deepest, bias=False),
            nn.Unflatten(1, (channels[-1], sides[-1], sides[-1])),
            nn.BatchNorm2d(channels[-1]),
            nn.ReLU(),
        )
    )
    down: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (side, (fewer, more)) in enumerate(zip(sides[1:], pairwise(channels), strict=True)):
        norm = [nn.BatchNorm2d(more)] if i else []
        down[f"side{side}"] = nn.Sequential(
            nn.Conv2d(fewer, more, KERNEL, 2, 1, bias=not norm), *norm, nn.LeakyReLU(SLOPE)
        )
    for side, (more, fewer) in zip(reversed(sides[:-1]), pairwise(reversed(channels)), strict=True):
        last = side == sides[0]
        up[f"side{side}"] = nn.Sequential(
            nn.ConvTranspose2d(more, fewer, KERNEL, 2, 1, output_padding=side % 2, bias=last),
            *([nn.Tanh()] if last else [nn.BatchNorm2d(fewer), nn.ReLU()]),
        )
    down["logit"] = nn.Sequential(nn.Flatten(), nn.Linear(deepest, 1))
    generator, discriminator = nn.Sequential(up), nn.Sequential(down)
    generator.apply(initialize)
    discriminator.apply(initialize)
    return generator, discriminator


def halved(side: int) -> Iterator[int]:
    """The side and its halves, rounded down, to one between 4 and 7."""
    yield side
    while side >= SMALLEST:
        side //= 2
        yield side


def initialize(layer: nn.Module) -> None:
    """Weights from N(0, 0.02), the scales of batch norms from N(1, 0.02), biases 0."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(layer.weight, 0.0, DEVIATION)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, DEVIATION)
        nn.init.zeros_(layer.bias)


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the task is not to make images."""
    return Gan(spec)
