"""Causal decoders from transformers: Llama (Touvron et al. 2023) and its relatives, and GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models import catalog
from models.attention import segment_mask
from models.backbones.encoder import build_decoder
from models.decoder_parts import DecoderParts, LanguageNetwork, Layer, Linear, linear, norm
from models.network import Network, complete
from models.spec import LanguageModel, ModelSpec, tag

# Rotations whose angles depend on nothing but the place.
ROTATIONS = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class CausalDecoder(LanguageNetwork):
    """`decoder`: the transformers model. Dropout is what its config says."""

    def __init__(self, spec: ModelSpec, config: dict[str, Any], max_length: int | None) -> None:
        super().__init__()
        self.spec = spec
        self.decoder: PreTrainedModel = build_decoder(config)
        self.decoder.config.use_cache = False
        self.family: str = self.decoder.config.model_type
        self.context = context(self.decoder.config.to_dict(), max_length)

    @property
    def _inside(self) -> Any:
        """What reads, without the layer that answers."""
        return self.decoder.base_model

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The embeddings, then each layer; the last norm belongs to the last layer, and so does the layer that answers
        where it has a table of its own."""
        inside, head = self._inside, self.decoder.get_output_embeddings()
        if self.family == "gpt2":
            tokens, layers, norm = nn.ModuleList([inside.wte, inside.wpe]), inside.h, inside.ln_f
        else:
            tokens, layers, norm = inside.embed_tokens, inside.layers, inside.norm
        *first, last = layers
        own = [] if head.weight is self.decoder.get_input_embeddings().weight else [head]
        named = [(f"layer{i}", part) for i, part in enumerate([*first, nn.ModuleList([last, norm, *own])])]
        return [("tokens", tokens), *named]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, asked: Tensor | None = None) -> dict[str, Tensor]:
        seen = segment_mask(attention_mask)
        # As many as each token sees but itself came before it.
        places = seen[:, 0].sum(-1) - 1
        states = self._inside(
            input_ids=input_ids, attention_mask=self._masks(seen), position_ids=places, use_cache=False
        ).last_hidden_state
        return {"logits": self.decoder.get_output_embeddings()(states if asked is None else states[asked])}

    def _masks(self, seen: Tensor) -> Tensor | dict[str, Tensor]:
        """As the family takes them: one, or one for each kind of layer."""
        config = self.decoder.config
        window = getattr(config, "sliding_window", None)
        near = seen if window is None else seen & seen.new_ones(seen.shape[-2:]).triu(1 - window)
        if self.family in ("qwen2", "qwen3"):
            return {"full_attention": seen, "sliding_attention": near}
        return near

    def parts(self) -> DecoderParts:
        config = self.decoder.config
        depth = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        gpt2 = self.family == "gpt2"
        return DecoderParts(
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
            depth=depth,
            table=self.decoder.get_input_embeddings().weight,
            places=self._inside.wpe.weight[: self.context] if gpt2 else None,
            rotation=None if gpt2 else self._rotation(),
            layers=list(map(gpt2_layer, self._inside.h) if gpt2 else map(llama_layer, self._inside.layers)),
            norm=norm(self._inside.ln_f if gpt2 else self._inside.norm),
            head=self.decoder.get_output_embeddings().weight,
            activation=ACTIVATIONS[config.activation_function if gpt2 else config.hidden_act],
        )

    def _rotation(self) -> tuple[Tensor, Tensor]:
        rotary = self._inside.rotary_emb
        cos, sin = rotary(rotary.inv_freq, torch.arange(self.context, device=rotary.inv_freq.device)[None])
        half = cos.shape[-1] // 2  # the second half is the first again
        return cos[0, :, :half], sin[0, :, :half]


def llama_layer(layer: Any) -> Layer:
    attention, feed = layer.self_attn, layer.mlp
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Layer(
        attention_norm=norm(layer.input_layernorm),
        query=linear(attention.q_proj),
        key=linear(attention.k_proj),
        value=linear(attention.v_proj),
        query_norm=norm(query_norm) if query_norm is not None else None,
        key_norm=norm(key_norm) if key_norm is not None else None,
        out=linear(attention.o_proj),
        scale=attention.scaling,
        window=window(attention),
        feed_norm=norm(layer.post_attention_layernorm),
        gate=linear(feed.gate_proj),
        widen=linear(feed.up_proj),
        narrow=linear(feed.down_proj),
    )


def window(attention: Any) -> int | None:
    """Of a layer: Qwen's say it themselves, Mistral's are all alike."""
    if attention.config.model_type == "mistral":
        return attention.config.sliding_window  # type: ignore[no-any-return]
    return getattr(attention, "sliding_window", None)


def gpt2_layer(layer: Any) -> Layer:
    query, key, value = thirds(layer.attn.c_attn)
    return Layer(
        attention_norm=norm(layer.ln_1),
        query=query,
        key=key,
        value=value,
        query_norm=None,
        key_norm=None,
        out=transposed(layer.attn.c_proj),
        scale=layer.attn.scaling,
        window=None,
        feed_norm=norm(layer.ln_2),
        gate=None,
        widen=transposed(layer.mlp.c_fc),
        narrow=transposed(layer.mlp.c_proj),
    )


def transposed(module: Any) -> Linear:
    """GPT-2 keeps its weights [in, out]."""
    return Linear(module.weight.T, module.bias)


def thirds(module: Any) -> Iterator[Linear]:
    """Queries, keys and values of GPT-2, which are one layer."""
    return map(Linear, module.weight.T.chunk(3), module.bias.chunk(3))


def context(config: dict[str, Any], max_length: int | None) -> int:
    """Tokens of a sequence at most. Raises ValueError when that is more than the decoder can read."""
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    assert isinstance(longest, int), "every family has it"
    if max_length is not None and max_length > longest:
        raise ValueError(f"max_length: {max_length} tokens, but the decoder reads at most {longest}")
    return max_length or longest


def is_causal_decoder(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a causal decoder of a family that is known."""
    return config.get("model_type") in catalog.DECODER_FAMILIES


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the decoder's configuration is still open (`weights.complete` fills it in), of no family
    that is known, or one whose rotation or activation is not; when it reads fewer tokens than `max_length`; and for
    another task."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.CausalDecoderParameters)
    task = complete(spec)
    if not isinstance(task, LanguageModel):
        raise ValueError(f"{spec.architecture} has no way to do the task {tag(task)}")
    if parameters.config is None:
        raise ValueError("causal_decoder: give `weights` (a backbone, folder, hub id or GGUF file), or `config`")
    if not is_causal_decoder(parameters.config):
        raise ValueError(
            f"causal_decoder: a {parameters.config.get('model_type')} is not among its families: "
            f"{', '.join(catalog.DECODER_FAMILIES)}"
        )
    network = CausalDecoder(spec, parameters.config, parameters.max_length)
    settings = network.decoder.config
    rotation = (getattr(settings, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in ROTATIONS:
        raise ValueError(
            f"causal_decoder: rope_type {rotation!r} turns a token by more than its place; known are "
            f"{', '.join(ROTATIONS)}"
        )
    activation = getattr(settings, "hidden_act", None) or settings.activation_function
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_decoder: the activation {activation!r} is not among {', '.join(ACTIVATIONS)}")
    if getattr(settings, "add_cross_attention", False):
        raise ValueError("causal_decoder: add_cross_attention: this decoder stands behind an encoder")
    return network
