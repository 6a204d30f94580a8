"""LeNet-5: LeCun, Bottou, Bengio and Haffner 1998 ("Gradient-based learning applied to document recognition")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import catalog
from models.cnn.convolution import normalize
from models.network import Headed, Network, Trunk
from models.spec import ModelSpec


class LeNet5(Trunk):
    """uint8 [batch, size, size, 3] → float32 [batch, 84].

    Two 5 × 5 convolutions, each followed by pooling that halves the side, then 120 and 84 units; tanh throughout, as
    in the paper. Its third convolution covers all that is left of a 32-pixel image: a dense layer, here for any size.
    """

    input_names = ("pixels",)
    width = 84

    def __init__(self, image_size: int, pooling: str) -> None:
        super().__init__()
        self.normalize = normalize()
        self.c1 = nn.Conv2d(3, 6, 5)
        self.c3 = nn.Conv2d(6, 16, 5)
        left = ((image_size - 4) // 2 - 4) // 2
        self.c5 = nn.Linear(16 * left * left, 120)
        self.f6 = nn.Linear(120, self.width)
        self.pool = nn.MaxPool2d(2) if pooling == "max" else nn.AvgPool2d(2)
        for layer in (self.c1, self.c3, self.c5, self.f6):
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            nn.init.xavier_uniform_(layer.weight, gain=nn.init.calculate_gain("tanh"))
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [("c1", self.c1), ("c3", self.c3), ("c5", self.c5), ("f6", self.f6)]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pool(torch.tanh(self.c1(self.normalize(pixels))))
        x = self.pool(torch.tanh(self.c3(x)))
        x = torch.tanh(self.c5(x.flatten(1)))
        return torch.tanh(self.f6(x))


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.LeNetParameters)
    return Headed(spec, LeNet5(parameters.image_size, parameters.pooling), parameters.dropout)
