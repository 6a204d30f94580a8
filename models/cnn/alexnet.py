"""AlexNet: Krizhevsky, Sutskever and Hinton 2012 ("ImageNet classification with deep convolutional networks")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import catalog
from models.cnn.convolution import normalize, scaled
from models.network import Headed, Network, Trunk
from models.spec import ModelSpec

# The paper's first layer leaves 55 of 224 pixels; smaller images get one that halves them.
SMALL = 128


class AlexNet(Trunk):
    """uint8 [batch, size, size, 3] → float32 [batch, 4096 · width].

    Five convolutions with ReLU, response normalization after the first two and overlapping 3 × 3 max pooling, then two
    dense layers with dropout in front of each. One column: the paper's two were for two graphics cards.
    """

    input_names = ("pixels",)

    def __init__(self, image_size: int, width: float, dropout: float) -> None:
        super().__init__()
        c = [scaled(n, width) for n in (96, 256, 384, 384, 256)]
        self.width = scaled(4096, width)
        self.normalize = normalize()
        first = nn.Conv2d(3, c[0], 5, 2, 2) if image_size < SMALL else nn.Conv2d(3, c[0], 11, 4, 2)
        self.convolutions = nn.ModuleList(
            [
                first,
                nn.Conv2d(c[0], c[1], 5, padding=2),
                nn.Conv2d(c[1], c[2], 3, padding=1),
                nn.Conv2d(c[2], c[3], 3, padding=1),
                nn.Conv2d(c[3], c[4], 3, padding=1),
            ]
        )
        self.response = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)
        self.pool = nn.MaxPool2d(3, 2)
        side = image_size // 2 if image_size < SMALL else (image_size - 7) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        self.f6 = nn.Linear(c[4] * side * side, self.width)
        self.f7 = nn.Linear(self.width, self.width)
        self.dropout = nn.Dropout(dropout)
        for layer in (*self.convolutions, self.f6, self.f7):
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [(f"c{i}", layer) for i, layer in enumerate(self.convolutions, 1)] + [("f6", self.f6), ("f7", self.f7)]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.normalize(pixels)
        for number, layer in enumerate(self.convolutions, 1):
            x = torch.relu(layer(x))
            if number <= 2:
                x = self.response(x)
            if number in (1, 2, 5):
                x = self.pool(x)
        x = torch.relu(self.f6(self.dropout(x.flatten(1))))
        return torch.relu(self.f7(self.dropout(x)))


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.AlexNetParameters)
    trunk = AlexNet(parameters.image_size, parameters.width, parameters.dropout)
    return Headed(spec, trunk, 0.0)
