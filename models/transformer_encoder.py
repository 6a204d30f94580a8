"""The encoder of a Transformer alone: it reads a text in both directions (Vaswani et al. 2017; Devlin et al. 2019).

With a head it classifies texts; without labels it learns tokens that were hidden from it, and hands on what it knows.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from models import catalog
from models.attention import padding_mask, places
from models.network import Headed, Network, Trunk, complete
from models.spec import MaskedLanguageModel, ModelSpec
from models.transformer_layers import PlacedTokens, Stack, known


class TextTrunk(Trunk):
    """int64 ids and mask [batch, sequence] → float32 [batch, width], the mean of the states of its tokens."""

    input_names = ("input_ids", "attention_mask")

    def __init__(self, vocabulary: int, parameters: catalog.TransformerParameters) -> None:
        super().__init__()
        self.width = parameters.width
        self.tokens = PlacedTokens(vocabulary, parameters.width, parameters.dropout)
        self.stack = Stack(parameters.layers, parameters.width, parameters.heads, parameters.hidden, parameters.dropout)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [("tokens", self.tokens), *self.stack.blocks()]

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Of each token: float32 [batch, sequence, width]."""
        x = self.tokens(input_ids, places(attention_mask))
        return self.stack(x, padding_mask(attention_mask))  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return mean(self.states(input_ids, attention_mask), attention_mask)


def mean(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Of the states of real tokens: float32 [batch, width]."""
    kept = attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1)


class TokenHead(nn.Module):
    """From the state of a hidden token to what the table of tokens is asked with: float32 [tokens, width] → the same.
    `bias`: of the logits."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(self.dense.weight.new_zeros(vocabulary))
        nn.init.xavier_uniform_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(functional.gelu(self.dense(states)))  # type: ignore[no-any-return]


class MaskedNetwork(Network):
    """Learns what stands at the places that it is asked about; is served as what it makes of a whole text."""

    input_names = ("input_ids", "attention_mask")
    output_names = ("embedding",)

    def __init__(self, spec: ModelSpec, trunk: TextTrunk, vocabulary: int) -> None:
        super().__init__()
        self.spec = spec
        self.trunk = trunk
        self.head = TokenHead(trunk.width, vocabulary)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return self.trunk.blocks()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, asked: Tensor | None = None) -> dict[str, Tensor]:
        """`embedding` float32 [batch, width]; or, with `asked` bool [batch, sequence], `logits` float32 [tokens asked
        about, vocabulary] in their order."""
        if asked is None:
            return {"embedding": self.trunk(input_ids, attention_mask)}
        states = self.trunk.states(input_ids, attention_mask)[asked]
        return {"logits": self.trunk.tokens.logits(self.head(states)) + self.head.bias}


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the vocabulary is still open, or the heads do not divide the width."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.TransformerParameters)
    vocabulary = known(spec.architecture, parameters.vocabulary)
    trunk = TextTrunk(vocabulary, parameters)
    if isinstance(complete(spec), MaskedLanguageModel):
        return MaskedNetwork(spec, trunk, vocabulary)
    return Headed(spec, trunk, parameters.dropout)
