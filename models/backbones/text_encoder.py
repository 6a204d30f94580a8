"""Any Hugging Face text encoder (BERT: Devlin et al. 2019, and its relatives) as a trunk."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from models import catalog
from models.backbones.blocks import blocks_of
from models.network import Network, Trunk
from models.spec import ModelSpec


class TextEncoder(Trunk):
    """int64 ids and mask [batch, sequence] → float32 [batch, hidden].

    pooling "mean": of the tokens that the mask keeps (Reimers and Gurevych 2019); "cls": the first token.
    """

    input_names = ("input_ids", "attention_mask")

    def __init__(self, config: dict[str, Any], pooling: str) -> None:
        super().__init__()
        settings = AutoConfig.for_model(**config)
        self.encoder: nn.Module = AutoModel.from_config(settings)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # its own summary of the sentence is not used
        self.pooling = pooling
        self.width = int(settings.hidden_size)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return blocks_of(self.encoder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        kept = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * kept).sum(dim=1) / kept.sum(dim=1)


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the encoder's configuration is still open (`weights.complete` fills it in)."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.TextEncoderParameters)
    if parameters.config is None:
        raise ValueError("text_encoder: give `weights` (a backbone, folder or hub id), or `config`")
    return Network(spec, TextEncoder(parameters.config, parameters.pooling), parameters.dropout)
