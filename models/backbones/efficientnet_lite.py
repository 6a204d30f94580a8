"""EfficientNet-Lite0: Tan and Le 2019 ("EfficientNet"), in the Lite variant for plain hardware.

Inverted residuals (Sandler et al. 2018) with ReLU6, without squeeze-and-excitation; stem and last convolution keep
their size. Pixels are scaled as its ImageNet weights expect: (x - 127) / 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from models import catalog
from models.network import Headed, Network, Normalize, Trunk
from models.spec import ModelSpec

MEAN, STD = 127 / 255, 128 / 255
STEM, WIDTH = 32, 1280
# repeats, kernel, stride of the first, expansion, output channels (table 1 of the paper)
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip


class ConvNorm(nn.Module):
    """Convolution, batch norm and, but for projections, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        # The original averages over a hundred batches; a short fine-tuning must settle on its own statistics sooner.
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.1)
        self.activation = nn.ReLU6(inplace=True) if activation else nn.Identity()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(self.conv(x)))
        return y


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise convolution, 1×1 projection; a skip where the shape stays.

    `drop`: probability that an item skips the block in training (stochastic depth, Huang et al. 2016).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, drop: float) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = ConvNorm(inputs, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = ConvNorm(inner, outputs, 1, activation=False)
        self.skip = stride == 1 and inputs == outputs
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        if not self.skip:
            return y
        if self.training and self.drop > 0.0:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop
            y = y * kept / (1.0 - self.drop)
        return x + y


class EfficientNetLite0(Trunk):
    """uint8 [batch, height, width, 3] → float32 [batch, 1280]."""

    input_names = ("pixels",)
    width = WIDTH

    def __init__(self, drop_connect: float) -> None:
        super().__init__()
        self.normalize = Normalize((MEAN, MEAN, MEAN), (STD, STD, STD))
        self.stem = ConvNorm(3, STEM, 3, stride=2)
        channels = [STEM] + [outputs for repeats, *_, outputs in STAGES for _ in range(repeats)]
        shapes = [
            (kernel, stride if i == 0 else 1, expansion)
            for repeats, kernel, stride, expansion, _ in STAGES
            for i in range(repeats)
        ]
        self.residuals = nn.ModuleList(
            InvertedResidual(inputs, outputs, *shape, drop=drop_connect * i / len(shapes))
            for i, ((inputs, outputs), shape) in enumerate(zip(pairwise(channels), shapes, strict=True))
        )
        self.last = ConvNorm(channels[-1], WIDTH, 1)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        inner = [(f"block{i}", block) for i, block in enumerate(self.residuals)]
        return [("stem", self.stem), *inner, ("last", self.last)]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(self.normalize(pixels))
        for block in self.residuals:
            x = block(x)
        features: Tensor = self.last(x)
        return features.mean(dim=(2, 3))


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.EfficientNetLiteParameters)
    return Headed(spec, EfficientNetLite0(parameters.drop_connect), parameters.dropout)


def from_package(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of the published ImageNet state dict turned into those of Network (`trunk.…`, `head.…`)."""
    renamed: dict[str, Tensor] = {}
    convolutions = {"_expand_conv": "expand.conv", "_depthwise_conv": "depthwise.conv", "_project_conv": "project.conv"}
    norms = {"_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm"}
    outside = {"_conv_stem": "trunk.stem.conv", "_bn0": "trunk.stem.norm", "_conv_head": "trunk.last.conv",
               "_bn1": "trunk.last.norm", "_fc": "head"}  # fmt: skip
    for key, tensor in state.items():
        if key.startswith("_blocks."):
            _, number, part, leaf = key.split(".")
            renamed[f"trunk.residuals.{number}.{(convolutions | norms)[part]}.{leaf}"] = tensor
        else:
            part, leaf = key.split(".")
            renamed[f"{outside[part]}.{leaf}"] = tensor
    return renamed
