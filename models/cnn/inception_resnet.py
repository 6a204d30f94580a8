"""Inception-ResNet-v2: Szegedy, Ioffe, Vanhoucke and Alemi 2017 ("Inception-v4, Inception-ResNet and the impact of
residual connections on learning")."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models import catalog
from models.cnn.convolution import ConvNorm, Pooled, scaled
from models.cnn.inception_v3 import Branches, chain, pooled, stem_layers
from models.network import Headed, Network
from models.spec import ModelSpec


class InceptionResidual(nn.Module):
    """relu(x + scale · W F(x)): branches, brought back to the width of x by a 1 × 1 without norm.

    Without the scale, of 0.1 to 0.2, very wide blocks die early in training (section 3.3).
    """

    def __init__(self, branches: Branches, inside: int, outside: int, scale: float) -> None:
        super().__init__()
        self.branches = branches
        self.back = nn.Conv2d(inside, outside, 1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.scale * self.back(self.branches(x)))


class InceptionResNet(Pooled):
    """uint8 [batch, size, size, 3] → float32 [batch, 1536 · width]. repeats: blocks of each of the three kinds."""

    block_name = "mixed"

    def __init__(self, image_size: int, width: float, repeats: tuple[int, int, int]) -> None:
        c = partial(scaled, width=width)
        stem = nn.Sequential(
            *stem_layers(image_size, width),
            Branches(
                chain(c(192), (c(96), 1)),
                chain(c(192), (c(48), 1), (c(64), 5)),
                chain(c(192), (c(64), 1), (c(96), 3), (c(96), 3)),
                pooled(c(192), c(64)),
            ),
        )
        x = c(96) + c(64) + c(96) + c(64)
        layers: list[nn.Module] = []
        for _ in range(repeats[0]):
            branches = Branches(
                chain(x, (c(32), 1)),
                chain(x, (c(32), 1), (c(32), 3)),
                chain(x, (c(32), 1), (c(48), 3), (c(64), 3)),
            )
            layers.append(InceptionResidual(branches, 2 * c(32) + c(64), x, 0.17))
        layers.append(
            Branches(
                chain(x, (c(384), 3), stride=2),
                chain(x, (c(256), 1), (c(256), 3), (c(384), 3), stride=2),
                nn.MaxPool2d(3, 2, 1),
            )
        )
        x += 2 * c(384)
        for _ in range(repeats[1]):
            branches = Branches(chain(x, (c(192), 1)), chain(x, (c(128), 1), (c(160), (1, 7)), (c(192), (7, 1))))
            layers.append(InceptionResidual(branches, 2 * c(192), x, 0.1))
        layers.append(
            Branches(
                chain(x, (c(256), 1), (c(384), 3), stride=2),
                chain(x, (c(256), 1), (c(288), 3), stride=2),
                chain(x, (c(256), 1), (c(288), 3), (c(320), 3), stride=2),
                nn.MaxPool2d(3, 2, 1),
            )
        )
        x += c(384) + c(288) + c(320)
        for _ in range(repeats[2]):
            branches = Branches(chain(x, (c(192), 1)), chain(x, (c(192), 1), (c(224), (1, 3)), (c(256), (3, 1))))
            layers.append(InceptionResidual(branches, c(192) + c(256), x, 0.2))
        layers.append(ConvNorm(x, c(1536), 1))
        super().__init__(stem, layers, c(1536))


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.InceptionResNetParameters)
    trunk = InceptionResNet(parameters.image_size, parameters.width, parameters.repeats)
    return Headed(spec, trunk, parameters.dropout)
