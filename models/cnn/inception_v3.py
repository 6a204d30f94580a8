"""Inception-v3: Szegedy et al. 2016 ("Rethinking the Inception architecture for computer vision").

Large kernels are factorized: 5 × 5 into two 3 × 3, 7 × 7 into 1 × 7 and 7 × 1, 3 × 3 into 1 × 3 beside 3 × 1. The size
is halved by a strided convolution beside a pooling, so that no layer is a bottleneck.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models import catalog
from models.cnn.convolution import ConvNorm, Pooled, scaled
from models.network import Headed, Network
from models.spec import ModelSpec

# The stem for ImageNet leaves an eighth of the side; smaller images keep a quarter.
SMALL = 128

Shape = int | tuple[int, int]


class Branches(nn.Module):
    """Sequences that read the same features; their outputs one behind the other along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def chain(inputs: int, *layers: tuple[int, Shape], stride: int = 1) -> nn.Sequential:
    """Convolutions one after the other, each (channels, kernel); `stride` is the last one's."""
    made: list[nn.Module] = []
    for i, (outputs, kernel) in enumerate(layers):
        made.append(ConvNorm(inputs, outputs, kernel, stride if i == len(layers) - 1 else 1))
        inputs = outputs
    return nn.Sequential(*made)


def stem_layers(image_size: int, width: float) -> list[nn.Module]:
    """Pixels to 192 · width channels, an eighth or (SMALL) a quarter of the side."""
    c = partial(scaled, width=width)
    return [
        chain(3, (c(32), 3), stride=2),
        chain(c(32), (c(32), 3), (c(64), 3)),
        nn.MaxPool2d(3, 2, 1),
        chain(c(64), (c(80), 1), (c(192), 3)),
        nn.MaxPool2d(3, 2, 1) if image_size >= SMALL else nn.Identity(),
    ]


def pooled(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), ConvNorm(inputs, outputs, 1))


class InceptionV3(Pooled):
    """uint8 [batch, size, size, 3] → float32 [batch, 2048 · width]."""

    block_name = "mixed"

    def __init__(self, image_size: int, width: float) -> None:
        c = partial(scaled, width=width)
        stem = nn.Sequential(*stem_layers(image_size, width))
        layers: list[nn.Module] = []
        inputs = c(192)
        for last in (c(32), c(64), c(64)):  # figure 5: two 3 × 3 see what one 5 × 5 sees
            layers.append(
                Branches(
                    chain(inputs, (c(64), 1)),
                    chain(inputs, (c(48), 1), (c(64), 3)),
                    chain(inputs, (c(64), 1), (c(96), 3), (c(96), 3)),
                    pooled(inputs, last),
                )
            )
            inputs = c(64) + c(64) + c(96) + last
        layers.append(
            Branches(
                chain(inputs, (c(384), 3), stride=2),
                chain(inputs, (c(64), 1), (c(96), 3), (c(96), 3), stride=2),
                nn.MaxPool2d(3, 2, 1),
            )
        )
        inputs += c(384) + c(96)
        for seven in (c(128), c(160), c(160), c(192)):  # figure 6: 7 × 7 as 1 × 7 and 7 × 1
            out = c(192)
            layers.append(
                Branches(
                    chain(inputs, (out, 1)),
                    chain(inputs, (seven, 1), (seven, (1, 7)), (out, (7, 1))),
                    chain(inputs, (seven, 1), (seven, (7, 1)), (seven, (1, 7)), (seven, (7, 1)), (out, (1, 7))),
                    pooled(inputs, out),
                )
            )
            inputs = 4 * out
        layers.append(
            Branches(
                chain(inputs, (c(192), 1), (c(320), 3), stride=2),
                chain(inputs, (c(192), 1), (c(192), (1, 7)), (c(192), (7, 1)), (c(192), 3), stride=2),
                nn.MaxPool2d(3, 2, 1),
            )
        )
        inputs += c(320) + c(192)
        for _ in range(2):  # figure 7: 3 × 3 spread into 1 × 3 beside 3 × 1
            out = c(384)
            layers.append(
                Branches(
                    chain(inputs, (c(320), 1)),
                    nn.Sequential(ConvNorm(inputs, out, 1), spread(out)),
                    nn.Sequential(ConvNorm(inputs, c(448), 1), ConvNorm(c(448), out, 3), spread(out)),
                    pooled(inputs, c(192)),
                )
            )
            inputs = c(320) + 4 * out + c(192)
        super().__init__(stem, layers, inputs)


def spread(channels: int) -> Branches:
    return Branches(ConvNorm(channels, channels, (1, 3)), ConvNorm(channels, channels, (3, 1)))


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.CnnParameters)
    return Headed(spec, InceptionV3(parameters.image_size, parameters.width), parameters.dropout)
