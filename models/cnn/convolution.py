"""What convolutional networks are made of: convolutions with batch norm, separable ones, and a trunk that pools."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.network import Normalize, Trunk

# Photographs and drawings alike: to about -1 to 1.
HALF = (0.5, 0.5, 0.5)


def normalize() -> Normalize:
    """Pixels to what a network that starts from random weights reads."""
    return Normalize(HALF, HALF)


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, at least 4 and a multiple of 4."""
    return max(4, 4 * round(channels * width / 4))


class Pooled(Trunk):
    """uint8 [batch, size, size, 3] → float32 [batch, width]: a stem, layers, and the average over all positions."""

    input_names = ("pixels",)
    block_name: str

    def __init__(self, stem: nn.Module, layers: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.normalize = normalize()
        self.stem = stem
        self.layers = nn.ModuleList(layers)
        self.width = width

    def blocks(self) -> list[tuple[str, nn.Module]]:
        learning = [layer for layer in self.layers if next(layer.parameters(), None) is not None]
        return [("stem", self.stem), *((f"{self.block_name}{i}", layer) for i, layer in enumerate(learning))]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(self.normalize(pixels))
        for layer in self.layers:
            x = layer(x)
        features: Tensor = x.mean(dim=(2, 3))
        return features


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm (Ioffe and Szegedy 2015) and, unless `relu` is off, ReLU.

    kernel: a side, or (height, width). With odd kernels and stride 1 the size stays: zero padding of (kernel - 1) / 2.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = ((sides[0] - 1) // 2, (sides[1] - 1) // 2)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = relu
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return torch.relu(y) if self.relu else y


class Separable(nn.Module):
    """A 3 × 3 convolution of each channel by itself, then a 1 × 1 across channels, and batch norm.

    It costs 1 / outputs + 1 / kernel² of a full convolution (Howard et al. 2017, section 3.1).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.depthwise.weight, mode="fan_in", nonlinearity="linear")
        nn.init.kaiming_normal_(self.pointwise.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.pointwise(self.depthwise(x)))
        return y
