"""The decoder of a Transformer alone: a language model, which reads from left to right (Vaswani et al. 2017; Radford et
al. 2018). It is exported as one step of decoding, whose keys and values are kept from step to step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from models import catalog
from models.attention import causal_mask, padding_mask, places, segment_mask, sinusoids
from models.decoder_parts import DecoderParts, LanguageNetwork, Layer, linear, norm
from models.network import Graph, Network, complete
from models.spec import LanguageModel, ModelSpec, tag
from models.transformer_layers import Cache, PlacedTokens, Stack, known

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
        states, _ = self.stack(self.tokens(input_ids, seen[:, 0].sum(-1) - 1), seen)
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

    def read(
        self, token: Tensor, token_mask: Tensor, whole_mask: Tensor, past: list[Cache] | None
    ) -> tuple[Tensor, list[Cache]]:
        """States of some tokens, float32 [batch, tokens, width], and each layer's keys and values of all so far.

        token, token_mask: int64 [batch, tokens], with padding anywhere. whole_mask: int64 [batch, past + tokens].
        """
        keys, queries = whole_mask.shape[1], token.shape[1]
        seen = padding_mask(whole_mask) & causal_mask(queries, keys, token.device)
        before = whole_mask.sum(1, keepdim=True) - token_mask.sum(1, keepdim=True)
        found: tuple[Tensor, list[Cache]] = self.stack(self.tokens(token, places(token_mask, before)), seen, past)
        return found

    def graphs(self) -> dict[str, Graph]:
        """ "model" is one step: new tokens and the past in, the last token's `logits` and the longer past out."""
        past = [f"past_{what}{i}" for i in range(len(self.stack.layers)) for what in ("keys", "values")]
        axes = {"token": {1: "tokens"}, "token_mask": {1: "tokens"}, "past_mask": {1: "steps"}}
        return {
            "model": Graph(
                Step(self),
                ("token", "token_mask", "past_mask", *past),
                ("logits", "next_past_mask", *(f"next_{name}" for name in past)),
                {**axes, **{name: {2: "steps"} for name in past}},
                self._examples,
            )
        }

    def _examples(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Of texts: their second half behind the first, all at once behind nothing, one token behind the others."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        while ids.shape[1] < 4:  # a dimension of 1 would be taken for a constant
            ids, mask = torch.cat((ids, ids), 1), torch.cat((mask, mask), 1)
        order = mask.argsort(stable=True, dim=1)  # padding goes to the left
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        step, found = Step(self), []
        inputs = self.graphs()["model"].inputs
        for cut in (ids.shape[1] // 2, 0, ids.shape[1] - 1):
            nothing = [self.empty(len(ids))] * (2 * len(self.stack.layers))
            begun = step(ids[:, :cut], mask[:, :cut], mask[:, :0], *nothing) if cut else {}
            past = [begun[f"next_{name}"] for name in inputs[2:]] if cut else [mask[:, :0], *nothing]
            found.append(dict(zip(inputs, (ids[:, cut:], mask[:, cut:], *past), strict=True)))
        return found

    def empty(self, rows: int) -> Tensor:
        """Keys or values of nothing."""
        width, heads = self.tokens.width, self.stack.heads
        return self.tokens.table.weight.new_zeros(rows, heads, 0, width // heads)


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


class Step(nn.Module):
    """Some more tokens of texts whose past is known."""

    def __init__(self, network: CausalNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, token: Tensor, token_mask: Tensor, past_mask: Tensor, *past: Tensor) -> dict[str, Tensor]:
        """token, token_mask: int64 [batch, tokens], padding on the left; past_mask: int64 [batch, steps]; past: keys
        and values of each layer in turn. → `logits` float32 [batch, vocabulary], and the past as it is then."""
        whole = torch.cat((past_mask, token_mask), dim=1)
        states, caches = self.network.read(token, token_mask, whole, list(zip(past[::2], past[1::2], strict=True)))
        after = {"next_past_mask": whole}
        for i, (keys, values) in enumerate(caches):
            after |= {f"next_past_keys{i}": keys, f"next_past_values{i}": values}
        return {"logits": self.network.tokens.logits(states[:, -1]), **after}


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the vocabulary is still open, or the heads do not divide the width."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.TransformerParameters)
    task = complete(spec)
    if not isinstance(task, LanguageModel):
        raise ValueError(f"{spec.architecture} has no way to do the task {tag(task)}")
    return CausalNetwork(spec, known(spec.architecture, parameters.vocabulary), parameters)
