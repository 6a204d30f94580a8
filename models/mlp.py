"""Multi-layer perceptron over a vector of numbers (Rumelhart, Hinton and Williams 1986)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from models import catalog
from models.hidden import hidden_layer
from models.network import Headed, Network, Trunk
from models.spec import ModelSpec


class Standardize(nn.Module):
    """(x - mean) / std with the training data's statistics, kept with the weights: serving receives raw values."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def fit(self, vectors: Tensor) -> None:
        """Take mean and deviation of `vectors` float32 [items, features]; a constant feature is only centred."""
        deviation = vectors.std(dim=0, correction=0)
        self.mean.copy_(vectors.mean(dim=0))
        self.std.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.std


class Perceptron(Trunk):
    """float32 [batch, features] → float32 [batch, hidden[-1]]."""

    input_names = ("vector",)

    def __init__(self, features: int, parameters: catalog.MlpParameters) -> None:
        super().__init__()
        self.standardize = Standardize(features)
        widths = (features, *parameters.hidden)
        self.layers = nn.ModuleList(
            hidden_layer(inputs, outputs, parameters.activation, parameters.pieces, parameters.bias)
            for inputs, outputs in pairwise(widths)
        )
        self.input_noise = parameters.input_noise
        self.input_dropout = nn.Dropout(parameters.input_dropout)
        self.dropout = nn.Dropout(parameters.dropout)
        self.width = widths[-1]

    def measure(self, inputs: Callable[[], list[Tensor]]) -> None:
        self.standardize.fit(inputs()[0])

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [(f"hidden.{i}", layer) for i, layer in enumerate(self.layers)]

    def forward(self, vector: Tensor) -> Tensor:
        units: Tensor = self.standardize(vector)
        if self.training and self.input_noise:
            units = units + self.input_noise * torch.randn_like(units)
        units = self.input_dropout(units)
        for i, layer in enumerate(self.layers):
            # The last layer's dropout is the head's own.
            units = layer(self.dropout(units) if i else units)
        return units


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the number of features is still open."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.MlpParameters)
    if parameters.features is None:
        raise ValueError("mlp: `features` is open; it is taken from the training data, or given as a hyper-parameter")
    trunk = Perceptron(parameters.features, parameters)
    return Headed(spec, trunk, parameters.dropout)
