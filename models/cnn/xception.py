"""Xception: Chollet 2017 ("Xception: deep learning with depthwise separable convolutions")."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from models import catalog
from models.cnn.convolution import ConvNorm, Pooled, Separable, scaled
from models.network import Headed, Network
from models.spec import ModelSpec

# The first convolution halves the side of images of ImageNet's size; smaller ones keep theirs.
SMALL = 96


class SeparableResidual(nn.Module):
    """x + separable convolutions, each with ReLU in front; `halve`: with a pooling and a strided skip (figure 5)."""

    def __init__(self, *channels: int, halve: bool, first_relu: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Separable(i, o) for i, o in pairwise(channels))
        self.first_relu = first_relu
        self.pool: nn.Module = nn.MaxPool2d(3, 2, 1) if halve else nn.Identity()
        self.skip: nn.Module = ConvNorm(channels[0], channels[-1], 1, 2, relu=False) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, layer in enumerate(self.layers):
            y = layer(torch.relu(y) if i or self.first_relu else y)
        pooled: Tensor = self.pool(y) + self.skip(x)
        return pooled


class Xception(Pooled):
    """uint8 [batch, size, size, 3] → float32 [batch, 2048 · width]. repeats: blocks of the middle flow."""

    block_name = "block"

    def __init__(self, image_size: int, width: float, repeats: int) -> None:
        c = partial(scaled, width=width)
        stem = nn.Sequential(ConvNorm(3, c(32), 3, 2 if image_size >= SMALL else 1), ConvNorm(c(32), c(64), 3))
        layers = [
            SeparableResidual(c(64), c(128), c(128), halve=True, first_relu=False),
            SeparableResidual(c(128), c(256), c(256), halve=True),
            SeparableResidual(c(256), c(728), c(728), halve=True),
            *(SeparableResidual(*[c(728)] * 4, halve=False) for _ in range(repeats)),
            SeparableResidual(c(728), c(728), c(1024), halve=True),
        ]
        last = nn.Sequential(Separable(c(1024), c(1536)), nn.ReLU(), Separable(c(1536), c(2048)), nn.ReLU())
        super().__init__(stem, [*layers, last], c(2048))

    def blocks(self) -> list[tuple[str, nn.Module]]:
        *blocks, (_, last) = super().blocks()
        return [*blocks, ("last", last)]


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.XceptionParameters)
    return Headed(spec, Xception(parameters.image_size, parameters.width, parameters.repeats), parameters.dropout)
