"""The Transformer (Vaswani et al. 2017): an encoder reads a text, a decoder writes its translation.

What the decoder attends to of the source, each layer's keys and values, is computed with the encoder, once a text. A
step of decoding then reads one token, behind the keys and values of those that were written before it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import catalog
from models.attention import causal_mask, padding_mask, places
from models.network import Graph, Network, complete
from models.spec import ModelSpec, Translation, tag
from models.transformer_layers import Cache, CrossStack, PlacedTokens, Stack, known

# Tokens before the one that is exported and compared: of a translation that has begun, and of one that has not.
BEGUN = (3, 0, 7)


class Translator(Network):
    """`encoder` and `decoder` have as many layers. Source and target have a table of tokens each; the target's makes
    the logits, too."""

    input_names = ("input_ids", "attention_mask")

    def __init__(
        self, spec: ModelSpec, vocabulary: int, target_vocabulary: int, parameters: catalog.TranslatorParameters
    ) -> None:
        super().__init__()
        self.spec = spec
        sizes = (parameters.layers, parameters.width, parameters.heads, parameters.hidden, parameters.dropout)
        self.source = PlacedTokens(vocabulary, parameters.width, parameters.dropout)
        self.encoder = Stack(*sizes)
        self.target = PlacedTokens(target_vocabulary, parameters.width, parameters.dropout)
        self.decoder = CrossStack(*sizes)
        self.output_names = self.names("memory")

    def names(self, of: str) -> tuple[str, ...]:
        """Of keys and values, layer by layer: "memory_keys0", "memory_values0", ..."""
        return tuple(f"{of}_{what}{i}" for i in range(len(self.decoder.layers)) for what in ("keys", "values"))

    def blocks(self) -> list[tuple[str, nn.Module]]:
        reading = [("source", self.source), *self.encoder.blocks("encoder")]
        return [*reading, ("target", self.target), *self.decoder.blocks("decoder")]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """input_ids, attention_mask: int64 [batch, sequence]; targets: int64 [batch, tokens], [BOS] and what follows.

        `logits`, float32 [batch, tokens, target vocabulary]: at each place of the token that is to come, from those
        up to there.
        """
        memory = self.read(input_ids, attention_mask)
        states, _, _ = self.write(targets, attention_mask, memory, None)
        return {"logits": self.target.logits(states)}

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> list[Cache]:
        """Keys and values of the source, of each layer of the decoder: float32 [batch, heads, sequence, depth]."""
        x = self.source(input_ids, places(attention_mask))
        states = self.encoder(x, padding_mask(attention_mask))
        return self.decoder.read(states)

    def write(
        self, token: Tensor, attention_mask: Tensor, memory: list[Cache], past: list[Cache] | None
    ) -> tuple[Tensor, list[Cache], Tensor]:
        """States of the tokens int64 [batch, tokens] behind the past, float32 [batch, tokens, width]; the keys and
        values of all so far; and the last layer's attention, float32 [batch, heads, tokens, sequence]."""
        tokens = token.shape[1]
        length = tokens if past is None else past[0][0].shape[2] + tokens
        x = self.target(token, torch.arange(length, device=token.device)[length - tokens :])
        found: tuple[Tensor, list[Cache], Tensor] = self.decoder(
            x, causal_mask(tokens, length, token.device), memory, padding_mask(attention_mask), past
        )
        return found

    def graphs(self) -> dict[str, Graph]:
        """ "model" reads the source, "decoder" writes one token more."""
        axes = {name: {1: "sequence"} for name in self.input_names}
        memory, past = self.names("memory"), self.names("past")
        behind = {**{name: {2: "sequence"} for name in memory}, **{name: {2: "steps"} for name in past}}
        outputs = ("logits", *(f"next_{name}" for name in past), "attention")
        decoder = Graph(
            Write(self),
            ("token", "attention_mask", *memory, *past),
            outputs,
            {"attention_mask": axes["attention_mask"], **behind},
            self._examples,
        )
        return {
            "model": Graph(Read(self), self.input_names, self.output_names, axes, lambda batch: [batch]),
            "decoder": decoder,
        }

    def _examples(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Translations that have begun with any tokens, and one that has not."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        memory = self.read(ids, mask)
        given = dict(zip(self.names("memory"), flat(memory), strict=True))
        tokens = (ids[:, :1] + torch.arange(max(BEGUN) + 1)) % self.target.table.num_embeddings
        width, heads = self.target.width, self.decoder.heads
        found = []
        for begun in BEGUN:
            nothing = ids.new_zeros((len(ids), heads, 0, width // heads), dtype=self.target.table.weight.dtype)
            past = [(nothing, nothing)] * len(memory)
            if begun:
                past = self.write(tokens[:, :begun], mask, memory, None)[1]
            states = dict(zip(self.names("past"), flat(past), strict=True))
            found.append({"token": tokens[:, begun : begun + 1], "attention_mask": mask, **given, **states})
        return found


class Read(nn.Module):
    """What the decoder attends to, of texts."""

    def __init__(self, network: Translator) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """int64 [batch, sequence] → `memory_…` float32 [batch, heads, sequence, width / heads]."""
        memory = self.network.read(input_ids, attention_mask)
        return dict(zip(self.network.names("memory"), flat(memory), strict=True))


class Write(nn.Module):
    """One token of each translation."""

    def __init__(self, network: Translator) -> None:
        super().__init__()
        self.network = network

    def forward(self, token: Tensor, attention_mask: Tensor, *states: Tensor) -> dict[str, Tensor]:
        """token: int64 [batch, 1]; attention_mask: int64 [batch, sequence]; states: the memory, then the past, keys and
        values of each layer in turn. → `logits` float32 [batch, target vocabulary], the past with this token, and
        `attention` float32 [batch, sequence], the mean of the last layer's heads."""
        pairs = list(zip(states[::2], states[1::2], strict=True))
        memory, past = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        found, after, weights = self.network.write(token, attention_mask, memory, past)
        names = (f"next_{name}" for name in self.network.names("past"))
        return {
            "logits": self.network.target.logits(found[:, -1]),
            **dict(zip(names, flat(after), strict=True)),
            "attention": weights.mean(1)[:, -1],
        }


def flat(caches: list[Cache]) -> list[Tensor]:
    """Keys and values in turn."""
    return [tensor for cache in caches for tensor in cache]


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when a vocabulary is still open, or the heads do not divide the width."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.TranslatorParameters)
    task = complete(spec)
    if not isinstance(task, Translation):
        raise ValueError(f"{spec.architecture} has no way to do the task {tag(task)}")
    vocabulary = known(spec.architecture, parameters.vocabulary)
    target_vocabulary = known(spec.architecture, parameters.target_vocabulary, "target_vocabulary")
    return Translator(spec, vocabulary, target_vocabulary, parameters)
