"""What networks over sequences begin with: a series standardized, or tokens embedded; zero where there is padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.catalog import SequenceParameters
from models.mlp import Standardize


class Series(nn.Module):
    """float32 [batch, length, channels], raw → the same, standardized, and 0 behind the end of each row."""

    input_names = ("series", "attention_mask")

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.standardize = Standardize(channels)
        self.width = channels

    def measure(self, inputs: Callable[[], list[Tensor]]) -> None:
        """Take the statistics of all real steps."""
        series, attention_mask = inputs()
        self.standardize.fit(series[attention_mask.bool()])

    def forward(self, series: Tensor, attention_mask: Tensor) -> Tensor:
        steps: Tensor = self.standardize(series)
        return steps * attention_mask.unsqueeze(-1)


class Tokens(nn.Module):
    """int64 [batch, sequence] → float32 [batch, sequence, width], 0 behind the end of each row."""

    input_names = ("input_ids", "attention_mask")

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.width = width
        nn.init.normal_(self.table.weight, std=width**-0.5)

    def measure(self, inputs: Callable[[], list[Tensor]]) -> None:
        """Tokens have no scale."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        vectors: Tensor = self.dropout(self.table(input_ids))
        return vectors * attention_mask.unsqueeze(-1)


def lengths(attention_mask: Tensor) -> Tensor:
    """int64 [batch]: up to which step each row of int64 [batch, length] has something, steps that are left out in
    between counted."""
    steps = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return (attention_mask * steps).amax(1)


def first_layer(architecture: str, parameters: SequenceParameters) -> Series | Tokens:
    """Raises ValueError when what the network reads is open, or is two things."""
    if parameters.channels is not None and parameters.vocabulary is None:
        return Series(parameters.channels)
    if parameters.vocabulary is not None and parameters.channels is None:
        return Tokens(parameters.vocabulary, parameters.embedding, parameters.dropout)
    raise ValueError(
        f"{architecture}: either `channels` (of a series) or `vocabulary` (of texts) is given; it is taken from the "
        "training data"
    )
