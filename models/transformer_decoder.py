"""The decoder of a Transformer alone: a language model, which reads from left to right (Vaswani et al. 2017; Radford et
al. 2018)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from models import catalog
from models.attention import segment_mask, sinusoids
from models.decoder_parts import DecoderParts, LanguageNetwork, Layer, linear, norm
from models.network import Network, complete
from models.spec import LanguageModel, ModelSpec, tag
from models.transformer_layers import PlacedTokens, Stack, known

# Tokens of a sequence, where `max_length` is open.
CONTEXT = 256


class CausalNetwork(LanguageNetwork):
    """The table that tokens are read with answers, too."""

    def __init__(self, spec: ModelSpec, vocabulary: int, parameters: catalog.TransformerParameters) -> None:
        super().__init__()
        self.spec = spec
        self.context = parameters.max_length or CONTEXT
        self.tokens = PlacedTokens(vocabulary, parameters.width, parameters.dropout)
        self.stack = Stack(parameters.layers, parameters.width, parameters.heads, parameters.hidden, parameters.dropout)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [("tokens", self.tokens), *self.stack.blocks()]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, asked: Tensor | None = None) -> dict[str, Tensor]:
        seen = segment_mask(attention_mask)
        # As many as each token sees, but itself, came before it.
        states = self.stack(self.tokens(input_ids, seen[:, 0].sum(-1) - 1), seen)
        return {"logits": self.tokens.logits(states if asked is None else states[asked])}

    def parts(self) -> DecoderParts:
        table, width = self.tokens.table.weight, self.tokens.width
        heads = self.stack.heads
        return DecoderParts(
            heads=heads,
            kv_heads=heads,
            depth=width // heads,
            table=table * math.sqrt(width),
            places=sinusoids(torch.arange(self.context, device=table.device), width),
            rotation=None,
            layers=[_layer(layer) for layer in self.stack.layers],
            norm=norm(self.stack.norm),
            head=table,
            activation="gelu",
        )


def _layer(layer: Any) -> Layer:
    attention, feed = layer.itself.attention, layer.feed
    return Layer(
        attention_norm=norm(layer.itself.norm),
        query=linear(attention.query),
        key=linear(attention.key),
        value=linear(attention.value),
        query_norm=None,
        key_norm=None,
        out=linear(attention.out),
        scale=attention.depth**-0.5,
        window=None,
        feed_norm=norm(feed.norm),
        gate=None,
        widen=linear(feed.widen),
        narrow=linear(feed.narrow),
    )


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the vocabulary is still open, or the heads do not divide the width."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.TransformerParameters)
    task = complete(spec)
    if not isinstance(task, LanguageModel):
        raise ValueError(f"{spec.architecture} has no way to do the task {tag(task)}")
    return CausalNetwork(spec, known(spec.architecture, parameters.vocabulary), parameters)
