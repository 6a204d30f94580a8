"""Hidden layers: an affine map and an activation, or a layer that is both."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.catalog import Activation

# Smooth or piecewise, each on its own. GELU by x · σ(1.702 x): Hendrycks and Gimpel 2016.
ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "gelu": nn.functional.gelu,
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": nn.functional.softplus,
}
# Those that saturate on both sides get Glorot's weights, the others He's.
SATURATING = ("sigmoid", "tanh")


class Dense(nn.Linear):
    """activation(W x + b): float32 [batch, inputs] → [batch, outputs]."""

    def __init__(self, inputs: int, outputs: int, activation: str, bias: float) -> None:
        super().__init__(inputs, outputs)
        self.activation = ELEMENTWISE[activation]
        initialize(self, activation, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class Prelu(nn.Linear):
    """max(0, z) + a min(0, z) with one learned slope a, 0.25 at first, for each unit (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, bias: float) -> None:
        super().__init__(inputs, outputs)
        self.slope = nn.Parameter(torch.full((outputs,), 0.25))
        initialize(self, "relu", bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.prelu(super().forward(x), self.slope)


class Maxout(nn.Module):
    """The largest of `pieces` affine maps, for each unit (Goodfellow et al. 2013)."""

    def __init__(self, inputs: int, outputs: int, pieces: int, bias: float) -> None:
        super().__init__()
        self.outputs, self.pieces = outputs, pieces
        self.maps = nn.Linear(inputs, outputs * pieces)
        initialize(self.maps, "relu", bias)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.maps(x)
        return maps.view(-1, self.outputs, self.pieces).amax(dim=2)


class Rbf(nn.Module):
    """exp(-‖W_i - x‖² / σ_i²): each unit answers to inputs near its own template W_i.

    σ starts at √(2 inputs), about the distance of a template from an input when both are standard normal: every unit
    has a gradient from the start.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.templates = nn.Parameter(torch.randn(outputs, inputs))
        self.log_width = nn.Parameter(torch.full((outputs,), 0.5 * math.log(2.0 * inputs)))

    def forward(self, x: Tensor) -> Tensor:
        products = x @ self.templates.T
        distances = x.square().sum(1, keepdim=True) - 2.0 * products + self.templates.square().sum(1)
        # Rounding may leave a little less than nothing.
        return torch.exp(-distances.clamp(min=0.0) * torch.exp(-2.0 * self.log_width))


def hidden_layer(inputs: int, outputs: int, activation: Activation, pieces: int, bias: float) -> nn.Module:
    """float32 [batch, inputs] → [batch, outputs]. pieces: of maxout. bias: what every bias starts with."""
    match activation:
        case "prelu":
            return Prelu(inputs, outputs, bias)
        case "maxout":
            return Maxout(inputs, outputs, pieces, bias)
        case "rbf":
            return Rbf(inputs, outputs)
        case _:
            return Dense(inputs, outputs, activation, bias)


def initialize(layer: nn.Linear, activation: str, bias: float) -> None:
    if activation in SATURATING:
        nn.init.xavier_normal_(layer.weight)
    else:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.constant_(layer.bias, bias)
