"""A decoder-only language model as its numbers: what its graph is written from, and none of how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.network import Graph, Network


@dataclass(frozen=True)
class Norm:
    """Layer norm (Ba et al. 2016); without `bias` the root mean square's (Zhang and Sennrich 2019). weight [width]."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float


@dataclass(frozen=True)
class Linear:
    """x Wᵀ + bias: weight [out, in], bias [out]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """x + attention(norm(x)), and to that the same of a feed-forward network.

    query_norm, key_norm: of each head's depth, before the rotation. scale: of the dot products. window: a token sees so
    many, itself the last (None: all). gate: its activation is multiplied with `widen`'s numbers; without it `widen`'s
    own are activated.
    """

    attention_norm: Norm
    query: Linear
    key: Linear
    value: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    out: Linear
    scale: float
    window: int | None
    feed_norm: Norm
    gate: Linear | None
    widen: Linear
    narrow: Linear


@dataclass(frozen=True)
class DecoderParts:
    """heads, kv_heads: of queries, and of keys and values; depth: numbers of a head.

    table: float32 [vocabulary, width], what a token is read as. places: float32 [context, width], added to it.
    rotation: cosines and sines, float32 [context, depth / 2] each (Su et al. 2021). head: [vocabulary, width], logits.
    activation: "silu", "gelu" (of the error function), "gelu_tanh" or "relu".
    """

    heads: int
    kv_heads: int
    depth: int
    table: Tensor
    places: Tensor | None
    rotation: tuple[Tensor, Tensor] | None
    layers: list[Layer]
    norm: Norm
    head: Tensor
    activation: str


def norm(module: Any) -> Norm:
    """Of torch's LayerNorm, or an RMS norm of transformers."""
    if isinstance(module, nn.LayerNorm):
        return Norm(module.weight, module.bias, module.eps)
    return Norm(module.weight, None, module.variance_epsilon)


def linear(module: nn.Linear) -> Linear:
    return Linear(module.weight, module.bias)


class LanguageNetwork(Network):
    """Texts to the logits of each token's successor. Its one graph is not traced, it is written from `parts()` by
    `export.decoder`. `context`: tokens of a sequence at most."""

    context: int
    input_names = ("input_ids", "attention_mask")
    output_names = ("logits",)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, asked: Tensor | None = None) -> dict[str, Tensor]:
        """input_ids: int64 [batch, sequence]. attention_mask: int64 of that shape, 0 for padding; tokens of one number
        are a text, which sees nothing of the others in its row and begins at place 0 (1 alone is the usual mask).

        → `logits` float32 [batch, sequence, vocabulary]; with `asked` bool [batch, sequence], of those places only:
        float32 [places, vocabulary] in their order.
        """
        raise NotImplementedError

    def parts(self) -> DecoderParts:
        """What the network is made of now: views of its weights, copies only where they are put together anew."""
        raise NotImplementedError

    def graphs(self) -> dict[str, Graph]:
        return {}
