"""VGG: Simonyan and Zisserman 2015 ("Very deep convolutional networks for large-scale image recognition")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import catalog
from models.cnn.convolution import normalize, scaled
from models.network import Headed, Network, Trunk
from models.spec import ModelSpec

# 3 × 3 convolutions before each of the five poolings (table 1 of the paper: A, B, D, E).
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


class Vgg(Trunk):
    """uint8 [batch, size, size, 3] → float32 [batch, 4096 · width].

    `norm`: batch norm after every convolution; the paper has none, and trains the deeper ones from the shallower.
    """

    input_names = ("pixels",)

    def __init__(self, depth: int, image_size: int, width: float, dropout: float, norm: bool) -> None:
        super().__init__()
        self.normalize = normalize()
        self.stages = nn.ModuleList()
        inputs = 3
        for count, channels in zip(STAGES[depth], CHANNELS, strict=True):
            outputs = scaled(channels, width)
            layers: list[nn.Module] = []
            for _ in range(count):
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm))
                layers += [nn.BatchNorm2d(outputs)] if norm else []
                layers.append(nn.ReLU(inplace=True))
                inputs = outputs
            self.stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        self.width = scaled(4096, width)
        side = image_size // 32
        self.f1 = nn.Linear(inputs * side * side, self.width)
        self.f2 = nn.Linear(self.width, self.width)
        self.dropout = nn.Dropout(dropout)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        stages = [(f"stage{i}", stage) for i, stage in enumerate(self.stages, 1)]
        return [*stages, ("f1", self.f1), ("f2", self.f2)]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.normalize(pixels)
        for stage in self.stages:
            x = stage(x)
        x = self.dropout(torch.relu(self.f1(x.flatten(1))))
        return torch.relu(self.f2(x))


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.VggParameters)
    trunk = Vgg(parameters.depth, parameters.image_size, parameters.width, parameters.dropout, parameters.norm)
    return Headed(spec, trunk, parameters.dropout)
