"""GoogLeNet: Szegedy et al. 2015 ("Going deeper with convolutions"); batch norm replaces auxiliary classifiers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import catalog
from models.cnn.convolution import ConvNorm, Pooled, scaled
from models.network import Headed, Network
from models.spec import ModelSpec

# 1 × 1; reduction and 3 × 3; reduction and 5 × 5; 1 × 1 behind the pooling (table 1 of the paper). None: max pooling.
MODULES = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)
# The stem for ImageNet leaves an eighth of the side; of smaller images it leaves half.
SMALL = 96


class Inception(nn.Module):
    """Four views of the same features side by side; the 1 × 1 reductions keep the wide kernels affordable."""

    def __init__(self, inputs: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, three_reduced, three, five_reduced, five, pooled = channels
        self.branches = nn.ModuleList(
            [
                ConvNorm(inputs, one, 1),
                nn.Sequential(ConvNorm(inputs, three_reduced, 1), ConvNorm(three_reduced, three, 3)),
                nn.Sequential(ConvNorm(inputs, five_reduced, 1), ConvNorm(five_reduced, five, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNorm(inputs, pooled, 1)),
            ]
        )
        self.outputs = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class GoogLeNet(Pooled):
    """uint8 [batch, size, size, 3] → float32 [batch, 1024 · width]."""

    block_name = "inception"

    def __init__(self, image_size: int, width: float) -> None:
        first, second = scaled(64, width), scaled(192, width)
        if image_size < SMALL:
            stem = nn.Sequential(ConvNorm(3, first, 3), ConvNorm(first, second, 3), nn.MaxPool2d(3, 2, 1))
        else:
            stem = nn.Sequential(
                ConvNorm(3, first, 7, 2),
                nn.MaxPool2d(3, 2, 1),
                ConvNorm(first, first, 1),
                ConvNorm(first, second, 3),
                nn.MaxPool2d(3, 2, 1),
            )
        layers: list[nn.Module] = []
        inputs = second
        for channels in MODULES:
            if channels is None:
                layers.append(nn.MaxPool2d(3, 2, 1))
                continue
            one, three_reduced, three, five_reduced, five, pooled = (scaled(n, width) for n in channels)
            module = Inception(inputs, (one, three_reduced, three, five_reduced, five, pooled))
            inputs = module.outputs
            layers.append(module)
        super().__init__(stem, layers, inputs)


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.CnnParameters)
    return Headed(spec, GoogLeNet(parameters.image_size, parameters.width), parameters.dropout)
