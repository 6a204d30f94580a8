"""Any Hugging Face text encoder (BERT: Devlin et al. 2019, and its relatives) as a trunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from models import catalog
from models.backbones.blocks import blocks_of
from models.backbones.encoder import build_encoder
from models.network import Headed, Network, Trunk
from models.spec import ModelSpec

# Families that transformers has for texts, as opposed to sounds, images, or pairs of them.
FAMILIES = frozenset(
    {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES}
)


class TextEncoder(Trunk):
    """int64 ids and mask [batch, sequence] → float32 [batch, hidden].

    pooling "mean": of the tokens that the mask keeps (Reimers and Gurevych 2019); "cls": the first token.
    """

    input_names = ("input_ids", "attention_mask")

    def __init__(self, config: Mapping[str, Any], pooling: str) -> None:
        super().__init__()
        self.encoder = build_encoder(config)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # its own summary of the sentence is not used
        self.pooling = pooling
        self.width = int(self.encoder.config.hidden_size)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return blocks_of(self.encoder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        kept = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * kept).sum(dim=1) / kept.sum(dim=1)


def is_text_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model from texts alone to one vector a token."""
    return config.get("model_type") in FAMILIES and not config.get("is_encoder_decoder")


def longest_text(encoder: nn.Module) -> int | None:
    """Tokens for which there are position embeddings; None where positions are not learned one by one."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "wpe")):
            # RoBERTa and its relatives count positions from behind the padding id.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the encoder's configuration is still open (`weights.complete` fills it in) or no text
    encoder's, and when it has fewer positions than `max_length`."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.TextEncoderParameters)
    if parameters.config is None:
        raise ValueError("text_encoder: give `weights` (a backbone, folder or hub id), or `config`")
    if not is_text_encoder(parameters.config):
        raise ValueError(f"text_encoder: a {parameters.config.get('model_type')} is no encoder of texts")
    trunk = TextEncoder(parameters.config, parameters.pooling)
    longest = longest_text(trunk.encoder)
    if longest is not None and parameters.max_length > longest:
        raise ValueError(f"max_length: {parameters.max_length} tokens, but the encoder reads at most {longest}")
    return Headed(spec, trunk, parameters.dropout)
