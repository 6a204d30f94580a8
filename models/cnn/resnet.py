"""ResNet: He, Zhang, Ren and Sun 2016 ("Deep residual learning for image recognition"), and the plain net beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import catalog
from models.cnn.convolution import ConvNorm, Pooled, scaled
from models.network import Headed, Network
from models.spec import ModelSpec

# Blocks in each of the four stages, and whether they are bottlenecks (table 1 of the paper).
STAGES = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True)}
CHANNELS = (64, 128, 256, 512)
EXPANSION = 4
# The stem for ImageNet leaves a quarter of the side; smaller images keep theirs.
SMALL = 96


class Residual(nn.Module):
    """relu(F(x) + x), F two 3 × 3 convolutions, or 1 × 1, 3 × 3, 1 × 1 in a bottleneck.

    Where the shape changes the skip is a 1 × 1 convolution (the paper's option B). skips: False for relu(F(x)).
    """

    def __init__(self, inputs: int, channels: int, stride: int, bottleneck: bool, skips: bool) -> None:
        super().__init__()
        self.outputs = channels * EXPANSION if bottleneck else channels
        if bottleneck:
            self.layers = nn.Sequential(
                ConvNorm(inputs, channels, 1),
                ConvNorm(channels, channels, 3, stride),
                ConvNorm(channels, self.outputs, 1, relu=False),
            )
        else:
            self.layers = nn.Sequential(
                ConvNorm(inputs, channels, 3, stride), ConvNorm(channels, channels, 3, relu=False)
            )
        self.skips = skips
        self.skip: nn.Module = nn.Identity()
        if skips and (stride != 1 or inputs != self.outputs):
            self.skip = ConvNorm(inputs, self.outputs, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return torch.relu(y + self.skip(x) if self.skips else y)


class ResNet(Pooled):
    """uint8 [batch, size, size, 3] → float32 [batch, 512 · width] (2048 · width for 50 layers)."""

    block_name = "block"

    def __init__(self, depth: int, image_size: int, width: float, skips: bool) -> None:
        counts, bottleneck = STAGES[depth]
        channels = scaled(CHANNELS[0], width)
        if image_size < SMALL:
            stem: nn.Module = ConvNorm(3, channels, 3)
        else:
            stem = nn.Sequential(ConvNorm(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1))
        layers: list[nn.Module] = []
        inputs = channels
        for stage, (count, full) in enumerate(zip(counts, CHANNELS, strict=True)):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                block = Residual(inputs, scaled(full, width), stride, bottleneck, skips)
                inputs = block.outputs
                layers.append(block)
        super().__init__(stem, layers, inputs)


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.ResNetParameters)
    trunk = ResNet(parameters.depth, parameters.image_size, parameters.width, parameters.skips)
    return Headed(spec, trunk, parameters.dropout)
