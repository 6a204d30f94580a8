"""Attention: scaled dot products, several heads, masks, and sinusoidal positions (Vaswani et al. 2017), written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.catalog import share_out


def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(Q Kᵀ / √depth) V, float32 [..., queries, depth], and the softmax, float32 [..., queries, keys].

    queries: float32 [..., queries, depth]; keys, values: float32 [..., keys, depth]. seen: bool, of a shape that
    spreads to [..., queries, keys]; a key that is not seen weighs exactly nothing. A query that sees none gets some
    finite answer, which is for nobody: padding.
    """
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    return weights @ values, weights


class Attention(nn.Module):
    """Several heads side by side: each attends in a learned projection of its own, `width` / `heads` numbers deep.

    What is attended to is read once, by `read`, so that a decoder can keep it. Raises ValueError when the heads do not
    divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.depth = share_out(width, heads)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of float32 [batch, length, width], each float32 [batch, heads, length, width / heads]."""
        return self._split(self.key(x)), self._split(self.value(x))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """x: float32 [batch, queries, width]; seen: bool, spread to [batch, heads, queries, keys].

        Returns float32 [batch, queries, width], and each head's weights [batch, heads, queries, keys].
        """
        found, weights = attend(self._split(self.query(x)), keys, values, seen)
        return self.out(found.transpose(1, 2).flatten(2)), weights

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.depth).transpose(1, 2)


def padding_mask(attention_mask: Tensor) -> Tensor:
    """int64 [batch, keys], 0 for padding → what any query sees: bool [batch, 1, 1, keys]."""
    return attention_mask.bool()[:, None, None, :]


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """What each of the last `queries` of `keys` tokens sees, itself and those before it: bool [queries, keys]."""
    places = torch.arange(keys, device=device)
    return places[None, :] <= places[keys - queries :, None]


def segment_mask(segments: Tensor) -> Tensor:
    """What each token sees, itself and those before it of the same number: int64 [batch, length] → bool [batch, 1,
    length, length]. Padding is a text of its own, so that every token sees one at least."""
    same = segments[:, :, None] == segments[:, None, :]
    return (same & causal_mask(segments.shape[1], segments.shape[1], segments.device))[:, None]


def places(attention_mask: Tensor) -> Tensor:
    """The place of each token in its text, from 0, wherever the padding is: int64 [batch, length]."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def sinusoids(places: Tensor, width: int) -> Tensor:
    """sin and cos of place / 10000^(2i / width) in turn: int64 [..., length] → float32 [..., length, width].

    Computed, not looked up: there is no longest text.
    """
    rates = torch.exp(torch.arange(0, width, 2, device=places.device) * (-math.log(10_000.0) / width))
    angles = places.unsqueeze(-1) * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]
