"""The layers of a Transformer (Vaswani et al. 2017), from token ids to states.

The layer norms stand before each part, inside the residual branch, and one behind the last layer: the gradient reaches
every layer as it is, and training needs no long warm-up (Xiong et al. 2020). Dropout is on the embeddings and on what
each part adds (the paper's residual dropout). The feed-forward network has GELU units (Hendrycks and Gimpel 2016).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.attention import Attention, sinusoids

# Keys and values of what was read: float32 [batch, heads, length, width / heads] each.
Cache = tuple[Tensor, Tensor]


def known(architecture: str, vocabulary: int | None, name: str = "vocabulary") -> int:
    """Raises ValueError when the vocabulary of this name is still open."""
    if vocabulary is None:
        raise ValueError(f"{architecture}: `{name}` is open; it is taken from the training data")
    return vocabulary


class PlacedTokens(nn.Module):
    """Embeddings, times √width, and the sinusoids of their places. The same table makes logits of states."""

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.width = width
        nn.init.normal_(self.table.weight, std=width**-0.5)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """int64 ids [batch, length], and places of that shape or [length] → float32 [batch, length, width]."""
        vectors = self.table(ids) * math.sqrt(self.width)
        return self.dropout(vectors + sinusoids(places, self.width).to(vectors.dtype))  # type: ignore[no-any-return]

    def logits(self, states: Tensor) -> Tensor:
        """float32 [..., width] → float32 [..., vocabulary]."""
        return functional.linear(states, self.table.weight)


class SelfAttention(nn.Module):
    """x + attention of norm(x) to itself, and to what came before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """The states, float32 [batch, length, width], and the keys and values of all that has been read by now."""
        normed = self.norm(x)
        keys, values = self.attention.read(normed)
        if past is not None:
            keys, values = torch.cat((past[0], keys), dim=2), torch.cat((past[1], values), dim=2)
        added, _ = self.attention(normed, keys, values, seen)
        return x + self.dropout(added), (keys, values)


class CrossAttention(nn.Module):
    """x + attention of norm(x) to a memory."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Cache, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The states, and each head's weights, float32 [batch, heads, length, memory's length]."""
        added, weights = self.attention(self.norm(x), *memory, seen)
        return x + self.dropout(added), weights


class FeedForward(nn.Module):
    """x + W₂ gelu(W₁ norm(x)), at every place alike."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.widen, self.narrow):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.narrow(functional.gelu(self.widen(self.norm(x))))
        return x + self.dropout(added)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Self-attention and a feed-forward network: float32 [batch, length, width] → the same."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.itself = SelfAttention(width, heads, dropout)
        self.feed = FeedForward(width, hidden, dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x, _ = self.itself(x, seen)
        return self.feed(x)  # type: ignore[no-any-return]


class CrossLayer(nn.Module):
    """Self-attention, attention to a memory, and a feed-forward network."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.itself = SelfAttention(width, heads, dropout)
        self.cross = CrossAttention(width, heads, dropout)
        self.feed = FeedForward(width, hidden, dropout)

    def forward(
        self, x: Tensor, seen: Tensor, memory: Cache, memory_seen: Tensor, past: Cache | None
    ) -> tuple[Tensor, Cache, Tensor]:
        """States float32 [batch, length, width], what was read, and each head's weights of the memory."""
        x, cache = self.itself(x, seen, past)
        x, weights = self.cross(x, memory, memory_seen)
        return self.feed(x), cache, weights


class Layers(nn.Module):
    """Layers one behind the other, and a norm behind the last. recomputes: while they learn, each keeps what goes into
    it alone, and computes the rest again for its gradients."""

    def __init__(self, layers: list[nn.Module], width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.recomputes = False

    def call(self, layer: nn.Module, *inputs: Any) -> Any:
        """What `layer` answers."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def blocks(self, name: str = "layer") -> list[tuple[str, nn.Module]]:
        """A layer is a block; the norm belongs to the last."""
        *first, last = self.layers
        parts = [*first, nn.ModuleList([last, self.norm])]
        return [(f"{name}{i}", part) for i, part in enumerate(parts)]


class Stack(Layers):
    """Of an encoder, or of a decoder alone."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__([Layer(width, heads, hidden, dropout) for _ in range(layers)], width, heads)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """float32 [batch, length, width] → states of that shape."""
        for layer in self.layers:
            x = self.call(layer, x, seen)
        return self.norm(x)  # type: ignore[no-any-return]


class CrossStack(Layers):
    """Of a decoder behind an encoder."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__([CrossLayer(width, heads, hidden, dropout) for _ in range(layers)], width, heads)

    def read(self, memory: Tensor) -> list[Cache]:
        """Each layer's keys and values of float32 [batch, sequence, width]."""
        return [layer.cross.attention.read(memory) for layer in self.layers]  # type: ignore[operator, union-attr]

    def forward(
        self, x: Tensor, seen: Tensor, memory: list[Cache], memory_seen: Tensor, past: list[Cache] | None
    ) -> tuple[Tensor, list[Cache], Tensor]:
        """States float32 [batch, length, width], each layer's keys and values of all that has been read by now, and
        each head's weights of the memory in the last layer."""
        caches, weights = [], x
        for i, layer in enumerate(self.layers):
            x, cache, weights = self.call(layer, x, seen, memory[i], memory_seen, past[i] if past is not None else None)
            caches.append(cache)
        return self.norm(x), caches, weights
