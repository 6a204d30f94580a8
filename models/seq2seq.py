"""A recurrent network reads a text, another one writes its translation.

Cho et al. 2014 ("Learning phrase representations using RNN encoder-decoder for statistical machine translation") and
Sutskever, Vinyals and Le 2014 ("Sequence to sequence learning with neural networks"): all that is read is one vector,
the context of every step. Bahdanau, Cho and Bengio 2015 ("Neural machine translation by jointly learning to align and
translate"): each step has a context of its own, the mean of what was read at each token, weighted by a score of it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from models import catalog
from models.network import AXES, Graph, Network, complete
from models.recurrent_layers import Recurrent
from models.sequences import Tokens, lengths
from models.spec import ModelSpec, Translation, tag

# Steps of the decoder that PyTorch and ONNX Runtime are compared on.
EXAMPLE_STEPS = 3


class Encoder(nn.Module):
    """input_ids, attention_mask int64 [batch, sequence] → what the decoder needs, in the order of `outputs`.

    memory: float32 [batch, sequence, directions · width], the state at each token; without attention [batch,
        directions · width], the one at the end of each direction.
    keys: float32 [batch, sequence, width], U h of the scores, the same at each step; with attention only.
    hidden, and of an LSTM cell: float32 [batch, layers, width], tanh(W final), the decoder's first state.
    """

    inputs = ("input_ids", "attention_mask")

    def __init__(self, parameters: catalog.Seq2SeqParameters, vocabulary: int) -> None:
        super().__init__()
        width, layers = parameters.width, parameters.layers
        self.tokens = Tokens(vocabulary, parameters.embedding, parameters.dropout)
        self.recurrent = Recurrent(
            parameters.cell, parameters.embedding, width, layers, parameters.bidirectional, parameters.dropout
        )
        self.width = self.recurrent.directions * width
        self.states = ("hidden", "cell") if parameters.cell == "lstm" else ("hidden",)
        self.bridges = nn.ModuleList(affine(self.width, layers * width) for _ in self.states)
        self.keys = affine(self.width, width, bias=False) if parameters.attention == "additive" else None
        self.outputs = ("memory", *(("keys",) if self.keys is not None else ()), *self.states)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        read, final = self.recurrent(self.tokens(input_ids, attention_mask), lengths(attention_mask))
        layers, width = self.recurrent.layers, self.recurrent.width
        states = [torch.tanh(bridge(final)).view(-1, layers, width) for bridge in self.bridges]
        found = dict(zip(self.states, states, strict=True))
        if self.keys is None:
            return {"memory": final, **found}
        return {"memory": read, "keys": self.keys(read), **found}


class AdditiveAttention(nn.Module):
    """Score e_j = v · tanh(W s + U h_j) of each token j, softmax over the real ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = affine(width, width)
        self.score = affine(width, 1, bias=False)

    def forward(self, state: Tensor, keys: Tensor, memory: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """state s: float32 [batch, width], keys U h: [batch, sequence, width], memory h: [batch, sequence, inputs] →
        context [batch, inputs] and the weights [batch, sequence], which add up to 1 and are 0 where there is padding.
        """
        scores = self.score(torch.tanh(self.query(state).unsqueeze(1) + keys)).squeeze(2)
        weights = scores.masked_fill(attention_mask == 0, -torch.inf).softmax(1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1), weights


class Decoder(nn.Module):
    """One step: the token before and the state before, in the order of `inputs` → `logits` float32 [batch, vocabulary],
    the state behind it, and with attention the weights of the source's tokens."""

    def __init__(self, parameters: catalog.Seq2SeqParameters, vocabulary: int, encoder: Encoder) -> None:
        super().__init__()
        embedding, width = parameters.embedding, parameters.width
        self.table = nn.Embedding(vocabulary, embedding)
        nn.init.normal_(self.table.weight, std=embedding**-0.5)
        self.attention = AdditiveAttention(width) if parameters.attention == "additive" else None
        self.recurrent = Recurrent(
            parameters.cell, embedding + encoder.width, width, parameters.layers, dropout=parameters.dropout
        )
        self.readout = affine(width + encoder.width + embedding, 2 * embedding)
        self.vocabulary = affine(embedding, vocabulary)
        self.dropout = nn.Dropout(parameters.dropout)
        self.states = encoder.states
        mask = ("attention_mask",) if self.attention is not None else ()
        self.inputs = ("token", *mask, *encoder.outputs)
        weights = ("attention",) if self.attention is not None else ()
        self.outputs = ("logits", *(f"next_{name}" for name in self.states), *weights)

    def forward(self, token: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        """token: int64 [batch, 1]; rest: as `inputs` names them."""
        given = dict(zip(self.inputs[1:], rest, strict=True))
        embedded = self.dropout(self.table(token))
        state = self.begin(given)
        context, weights = given["memory"], None
        if self.attention is not None:
            context, weights = self.attention(state[0][-1], given["keys"], context, given["attention_mask"])
        context = context.unsqueeze(1)
        outputs, state = self.recurrent.unroll(torch.cat([embedded, context], 2), None, state)
        found = {"logits": self.read_out(outputs, context, embedded).squeeze(1)}
        found |= {f"next_{name}": part.transpose(0, 1) for name, part in zip(self.states, state, strict=True)}
        return found if weights is None else {**found, "attention": weights}

    def forced(self, targets: Tensor, encoded: dict[str, Tensor], attention_mask: Tensor) -> Tensor:
        """targets: int64 [batch, tokens] → logits float32 [batch, tokens, vocabulary], of the token behind each: as one
        step after another, whichever token was the likeliest."""
        embedded = self.dropout(self.table(targets))
        state = self.begin(encoded)
        memory = encoded["memory"]
        if self.attention is None:
            contexts = memory.unsqueeze(1).expand(-1, targets.shape[1], -1)
            outputs, _ = self.recurrent.unroll(torch.cat([embedded, contexts], 2), None, state)
            return self.read_out(outputs, contexts, embedded)
        steps: list[tuple[Tensor, Tensor]] = []
        for token in embedded.split(1, dim=1):
            context, _ = self.attention(state[0][-1], encoded["keys"], memory, attention_mask)
            output, state = self.recurrent.unroll(torch.cat([token, context.unsqueeze(1)], 2), None, state)
            steps.append((output, context.unsqueeze(1)))
        outputs, contexts = (torch.cat(parts, 1) for parts in zip(*steps, strict=True))
        return self.read_out(outputs, contexts, embedded)

    def begin(self, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The state as recurrent layers have it, [layers, batch, width]."""
        return tuple(given[name].transpose(0, 1).contiguous() for name in self.states)

    def read_out(self, outputs: Tensor, contexts: Tensor, embedded: Tensor) -> Tensor:
        """The deep output of both papers: the larger of each two units that see state, context and token before."""
        pairs = self.readout(torch.cat([outputs, contexts, embedded], 2)).unflatten(2, (-1, 2))
        return cast(Tensor, self.vocabulary(self.dropout(pairs.amax(3))))


class Seq2Seq(Network):
    """`model.onnx` is the encoder, `decoder.onnx` one step."""

    def __init__(
        self, spec: ModelSpec, parameters: catalog.Seq2SeqParameters, vocabulary: int, target_vocabulary: int
    ) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(parameters, vocabulary)
        self.decoder = Decoder(parameters, target_vocabulary, self.encoder)
        self.input_names = self.encoder.inputs
        self.output_names = self.encoder.outputs

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [("encoder", self.encoder), ("decoder", self.decoder)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Teacher forcing. targets: int64 [batch, tokens], from the beginning on → `logits` float32 [batch, tokens,
        target vocabulary], of the token behind each."""
        encoded = self.encoder(input_ids, attention_mask)
        return {"logits": self.decoder.forced(targets, encoded, attention_mask)}

    def graphs(self) -> dict[str, Graph]:
        attended = ("attention_mask", "memory", "keys") if self.decoder.attention is not None else ()
        axes = {name: {1: "sequence"} for name in attended}
        return {
            "model": Graph(self.encoder, self.input_names, self.output_names, AXES, lambda batch: [batch]),
            "decoder": Graph(self.decoder, self.decoder.inputs, self.decoder.outputs, axes, self._steps),
        }

    def _steps(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The first steps of the decoder, from any token on."""
        given = {**batch, **self.encoder(*(batch[name] for name in self.input_names))}
        given["token"] = batch["input_ids"][:, :1] % self.decoder.table.num_embeddings
        examples = []
        for _ in range(EXAMPLE_STEPS):
            examples.append({name: given[name] for name in self.decoder.inputs})
            found = self.decoder(*examples[-1].values())
            given |= {name: found[f"next_{name}"] for name in self.decoder.states}
            given["token"] = found["logits"].argmax(1, keepdim=True)
        return examples


def affine(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """With Glorot's weights (Glorot and Bengio 2010), and biases of 0."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def build(spec: ModelSpec) -> Network:
    """Raises ValueError for another task, or when a vocabulary is still open."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.Seq2SeqParameters)
    task = complete(spec)
    if not isinstance(task, Translation):
        raise ValueError(f"{spec.architecture} has no way to do the task {tag(task)}")
    if parameters.vocabulary is None or parameters.target_vocabulary is None:
        raise ValueError(
            f"{spec.architecture}: `vocabulary` and `target_vocabulary` are open; they are taken from the training data"
        )
    return Seq2Seq(spec, parameters, parameters.vocabulary, parameters.target_vocabulary)
