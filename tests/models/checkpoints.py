"""Checkpoints of decoders small enough to be written in a test, as Hugging Face folders and as GGUF files."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from models import registry
from models.decoder_parts import LanguageNetwork
from models.spec import LanguageModel, ModelSpec

VOCABULARY = 300
BEGIN, END, TURN = 0, 1, 2
SPECIAL = ("<s>", "</s>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
TEXTS = ["the cat sleeps today", "the dog sleeps in 1984 and in 2024", "a cat and a dog"] * 5


def tokenizer(begins: bool = True) -> Tokenizer:
    """Byte-level, as GPT-2's and Llama 3's are; with `begins` it puts <s> before a text."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return made


def drawn(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """Random weights, so large that its answers differ."""
    torch.manual_seed(seed)
    model: transformers.PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def llama(context: int, **more: Any) -> transformers.LlamaConfig:
    """Of a decoder that reads `context` tokens."""
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        **more,
    )


def network_of(model: transformers.PreTrainedModel, context: int) -> LanguageNetwork:
    """The network of ours with the weights of a causal decoder."""
    hyperparameters = {"config": model.config.to_dict(), "max_length": context}
    spec = ModelSpec(architecture="causal_decoder", hyperparameters=hyperparameters, task=LanguageModel())
    network = registry.build(spec)
    assert isinstance(network, LanguageNetwork)
    network.load_state_dict({f"decoder.{name}": value for name, value in model.state_dict().items()})
    return network


def folder(config: transformers.PretrainedConfig, path: Path, begins: bool = True) -> transformers.PreTrainedModel:
    """A whole checkpoint at `path`, whose turns end otherwise than its texts; the model that it is of."""
    model = drawn(config)
    model.generation_config.eos_token_id = [TURN, END]
    model.save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(begins), bos_token=SPECIAL[BEGIN], eos_token=SPECIAL[END], chat_template=TEMPLATE
    ).save_pretrained(path)
    return model


def gguf_file(
    model: transformers.PreTrainedModel,
    path: Path,
    *,
    quantized: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Mapping[str, str] | None = None,
    split: str = "gpt-2",
    begins: bool = True,
) -> None:
    """Write a Llama or Qwen2 as llama.cpp's converter does. quantized: its matrices."""
    config: Any = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (extra or {}).items():
        writer.add_string(name, value)
    made = tokenizer()
    names = sorted(made.get_vocab(), key=made.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(names)
    writer.add_token_types([3 if name in SPECIAL else 1 for name in names])
    writer.add_token_merges([" ".join(pair) for pair in _merges(made)])
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_eot_token_id(TURN)
    writer.add_add_bos_token(begins)
    writer.add_chat_template(TEMPLATE)
    names_of = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA if family == "llama" else gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if family == "llama" and "q_proj" in name:
            values = _paired(values, config.num_attention_heads)
        if family == "llama" and "k_proj" in name:
            values = _paired(values, config.num_key_value_heads)
        kind = quantized if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        target = names_of.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        raw = gguf.quants.quantize(values, kind)
        writer.add_tensor(target, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges(made: Tokenizer) -> list[list[str]]:
    found: list[list[str]] = json.loads(made.to_str())["model"]["merges"]
    return found


def _paired(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection as llama.cpp turns them: neighbours, where transformers turns halves."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
