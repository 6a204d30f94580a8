"""A transformers model from its config.json as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

# They say how a checkpoint is kept and run elsewhere, not what the network is: its precision, its answer as a tuple,
# kernels and code to be fetched.
NOT_THE_NETWORK = frozenset(
    ("auto_map", "dtype", "torch_dtype", "quantization_config", "return_dict", "attn_implementation",
     "_attn_implementation")
)  # fmt: skip


def build_encoder(config: Mapping[str, Any]) -> PreTrainedModel:
    """The bare model that `config` describes: float32, random weights, `.config` its settings.

    Raises ValueError when no such model can be built, and why.
    """
    return _built(config, AutoModel)


def build_decoder(config: Mapping[str, Any]) -> PreTrainedModel:
    """As `build_encoder`, a causal decoder with the layer behind it that answers the next token."""
    return _built(config, AutoModelForCausalLM)


def _built(config: Mapping[str, Any], kind: type[AutoModel] | type[AutoModelForCausalLM]) -> PreTrainedModel:
    kept = {key: value for key, value in config.items() if key not in NOT_THE_NETWORK}
    if not isinstance(kept.get("model_type"), str):
        raise ValueError("config: `model_type` is missing; give the whole config.json of a Hugging Face checkpoint")
    try:
        settings = AutoConfig.for_model(**kept)
        return kind.from_config(settings, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # every family of transformers raises what it likes on values that do not fit
        raise ValueError(f"config of a {kept['model_type']}: {error}") from error
