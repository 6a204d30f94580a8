"""A recurrent network that reads a series or a text to its end; a dense layer behind it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from models import catalog
from models.network import Headed, Network, Trunk
from models.recurrent_layers import Kind, Recurrent
from models.sequences import Series, Tokens, first_layer, lengths
from models.spec import ModelSpec


class RecurrentTrunk(Trunk):
    """A sequence and its mask [batch, length] → float32 [batch, directions · width], the state at the end of each
    direction."""

    def __init__(self, kind: Kind, first: Series | Tokens, parameters: catalog.RecurrentParameters) -> None:
        super().__init__()
        self.first = first
        self.input_names = first.input_names
        self.recurrent = Recurrent(
            kind, first.width, parameters.width, parameters.layers, parameters.bidirectional, parameters.dropout
        )
        self.width = self.recurrent.directions * parameters.width

    def measure(self, inputs: Callable[[], list[Tensor]]) -> None:
        self.first.measure(inputs)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        tokens = [("tokens", self.first)] if isinstance(self.first, Tokens) else []
        return [*tokens, ("recurrent", self.recurrent)]

    def forward(self, sequence: Tensor, attention_mask: Tensor) -> Tensor:
        _, final = self.recurrent(self.first(sequence, attention_mask), lengths(attention_mask))
        return cast(Tensor, final)


def build(spec: ModelSpec) -> Network:
    """`spec.architecture` names the cell. Raises ValueError when what the network reads is still open."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.RecurrentParameters)
    trunk = RecurrentTrunk(cast(Kind, spec.architecture), first_layer(spec.architecture, parameters), parameters)
    return Headed(spec, trunk, parameters.dropout)
