"""Causal decoders of transformers and our own: packed texts, masks, weights on disk, and their graphs over slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from export import slot_parity
from export.decoder import write_decoder
from export.onnx import export_onnx
from export.parity import ParityError, check
from models import registry
from models.backbones.causal_decoder import CausalDecoder
from models.catalog import DECODER_FAMILIES
from models.decoder_parts import LanguageNetwork
from models.spec import Classification, LanguageModel, ModelSpec
from models.transformer_decoder import CausalNetwork

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10_000.0,
}
# Every family, and in some of them what few checkpoints have.
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL),
    "llama-tied-deep-heads": transformers.LlamaConfig(**SMALL, head_dim=32, tie_word_embeddings=True),
    "llama-biases": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama-linear": transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    ),
    "llama-llama3": transformers.LlamaConfig(**SMALL, head_dim=16, rope_parameters=LLAMA3),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=None),
    "mistral-window": transformers.MistralConfig(**SMALL, sliding_window=5),
    "qwen2": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-window": transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen2-yarn": transformers.Qwen2Config(**SMALL, rope_parameters=YARN),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=16),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt2-layer-scale": transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
    ),
}


def spec_of(config: transformers.PretrainedConfig | dict[str, Any], **more: Any) -> ModelSpec:
    data = config if isinstance(config, dict) else config.to_dict()
    return ModelSpec(architecture="causal_decoder", hyperparameters={"config": data, **more}, task=LanguageModel())


def decoder(kind: str, **more: Any) -> CausalDecoder:
    """Every parameter of which matters: biases and the weights of norms are drawn, too."""
    torch.manual_seed(0)
    network = registry.build(spec_of(CONFIGS[kind], **more))
    assert isinstance(network, CausalDecoder)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def texts(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows + length))


@pytest.fixture(params=CONFIGS, scope="module")
def network(request: pytest.FixtureRequest) -> CausalDecoder:
    return decoder(request.param)


@torch.no_grad()
def test_a_text_is_answered_as_transformers_does(network: CausalDecoder, tmp_path: Path) -> None:
    network.decoder.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids, mask = texts(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = mask[2, 4:] = 0
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    found = network(ids, mask)["logits"]
    assert found[mask == 1].std() > 0.1, "logits that are all alike would agree with anything"
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=2e-5, rtol=1e-4)
    asked = (mask == 1) & (torch.arange(12) % 3 == 0)
    torch.testing.assert_close(network(ids, mask, asked)["logits"], found[asked])


@torch.no_grad()
def test_packed_texts_are_those_texts(network: CausalDecoder) -> None:
    parts = [texts(1, length) for length in (5, 9, 1, 6)]
    packed = torch.cat([*parts, torch.zeros(1, 3, dtype=torch.int64)], 1)
    segments = torch.tensor([[number for number, part in enumerate(parts, 1) for _ in part[0]] + [0] * 3])
    found = network(packed, segments)["logits"][0, :-3].split([part.shape[1] for part in parts])
    for part, logits in zip(parts, found, strict=True):
        torch.testing.assert_close(logits, network(part, torch.ones_like(part))["logits"][0], atol=2e-5, rtol=1e-4)
    assert network(packed, segments)["logits"].isfinite().all()


@torch.no_grad()
def test_padding_may_stand_before_a_text(network: CausalDecoder) -> None:
    ids = texts(1, 6)
    padded = torch.cat([torch.full((1, 4), 7), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    alone = network(ids, torch.ones_like(ids))["logits"]
    torch.testing.assert_close(network(padded, mask)["logits"][:, 4:], alone, atol=2e-5, rtol=1e-4)


def test_every_parameter_is_in_one_block_and_learns(network: CausalDecoder) -> None:
    ids = texts(2, 9)
    network(ids, torch.ones_like(ids))["logits"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.zero_grad()
    assert [name for name, _ in network.blocks()] == ["tokens", "layer0", "layer1"]
    inside = [id(parameter) for _, block in network.blocks() for parameter in block.parameters()]
    assert sorted(inside) == sorted(map(id, network.parameters()))


@torch.no_grad()
def test_a_network_comes_back_from_its_folder(network: CausalDecoder, tmp_path: Path) -> None:
    registry.save(network, tmp_path)
    again = registry.restore(tmp_path).eval()
    ids = texts(2, 7)
    assert torch.equal(again(ids, torch.ones_like(ids))["logits"], network(ids, torch.ones_like(ids))["logits"])
    tables = {id(again.decoder.get_input_embeddings().weight), id(again.decoder.get_output_embeddings().weight)}
    assert len(tables) == (1 if network.decoder.config.tie_word_embeddings else 2)


def test_every_family_is_under_test() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(DECODER_FAMILIES)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (spec_of(transformers.BertConfig()), "a bert is not among its families: gpt2, llama, mistral, qwen2, qwen3"),
        (spec_of({"hidden_size": 32}), "a None is not among its families: gpt2, llama"),
        (ModelSpec(architecture="causal_decoder", task=LanguageModel()), "give `weights` .* or `config`"),
        (ModelSpec(architecture="causal_decoder", task=Classification(2)), "no way to do the task classification"),
        (spec_of(CONFIGS["llama"], max_length=65), "max_length: 65 tokens, but the decoder reads at most 64"),
        (spec_of(CONFIGS["gpt2"], max_length=65), "max_length: 65 tokens, but the decoder reads at most 64"),
        (spec_of({**CONFIGS["llama"].to_dict(), "hidden_act": "mish"}), "the activation 'mish' is not among silu"),
        (
            spec_of(transformers.LlamaConfig(**SMALL, rope_parameters={**YARN, "rope_type": "dynamic"})),
            "rope_type 'dynamic' .* known are default, linear, llama3, yarn",
        ),
        (spec_of({**CONFIGS["llama"].to_dict(), "hidden_size": 30}), "config of a llama: "),
    ],
)
def test_what_would_not_be_computed_as_it_was_trained_is_refused(spec: ModelSpec, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        registry.build(spec)


def own(**more: Any) -> CausalNetwork:
    torch.manual_seed(0)
    sizes = {"vocabulary": VOCABULARY, "width": 24, "layers": 2, "max_length": 40, "feedforward": 40, **more}
    spec = ModelSpec(architecture="transformer_decoder", hyperparameters=sizes, task=LanguageModel())
    network = registry.build(spec)
    assert isinstance(network, CausalNetwork)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def batch(*lengths: int) -> dict[str, np.ndarray]:
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": texts(len(lengths), max(lengths)).numpy() * mask, "attention_mask": mask}


@pytest.fixture(params=[{}, {"heads": 2, "width": 32}], ids=["heads-of-6", "heads-of-16"])
def ours(request: pytest.FixtureRequest) -> CausalNetwork:
    return own(**request.param)


def assert_slots_agree(network: LanguageNetwork, folder: Path) -> None:
    """Of texts short and long, one that fills the context, and a single token."""
    write_decoder(network.parts(), folder / "model.onnx")
    batches = [batch(9, 1, 24, 2, 6, 3), batch(network.context, 7, 7), batch(1)]
    found = list(slot_parity.answers(network, folder / "model.onnx", batches))
    assert {length for one in found for length in one.lengths} >= {1, network.context}
    assert set.union(*(one.rows for one in found)) >= {1, 3, 4, 5}
    for one in found:
        assert one.expected.std() > 0.1, "logits that are all alike would agree with anything"
        np.testing.assert_allclose(one.found, one.expected, atol=2e-5 * max(1.0, np.abs(one.expected).max()))


def test_the_graph_on_slots_answers_as_the_whole_text(network: CausalDecoder, tmp_path: Path) -> None:
    assert_slots_agree(network, tmp_path)


def test_our_own_decoder_on_slots_answers_as_the_whole_text(ours: CausalNetwork, tmp_path: Path) -> None:
    assert_slots_agree(ours, tmp_path)


def test_a_decoder_is_exported_with_its_weights_beside_the_graph(tmp_path: Path) -> None:
    network = decoder("llama", max_length=48)
    batches = [batch(9, 1, 24), batch(48)]
    graphs = export_onnx(network, tmp_path, batches[0])
    parity = check(network, tmp_path, batches)
    assert parity.samples == 4
    assert parity.lengths == [1, 9, 24, 48]
    assert parity.batch_sizes == [1, 3, 4]
    assert 0.0 < parity.largest_difference < 1e-4
    shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in graphs["model"].inputs}
    assert shapes["token"] == ("int64", ["batch", "tokens"])
    assert shapes["length"] == ("int32", ["batch"])
    assert shapes["longest"] == ("int32", [])
    assert shapes["asked"] == ("int64", ["places"])
    assert shapes["past_values1"] == ("float32", ["batch", 2, "slot", 16])
    answers = {tensor.name: tensor.shape for tensor in graphs["model"].outputs}
    assert answers["logits"] == ["places", VOCABULARY]
    assert answers["next_past_values1"] == shapes["past_values1"][1]
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    parameters = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert files.keys() == {"model.onnx", "model.onnx.data"}
    assert files["model.onnx.data"] > parameters


def test_a_graph_of_other_weights_is_found_out(tmp_path: Path) -> None:
    network = decoder("qwen3")
    export_onnx(network, tmp_path, batch(9))
    with torch.no_grad():
        network.decoder.model.layers[1].self_attn.k_norm.weight[0] += 0.1
    with pytest.raises(ParityError, match="read in pieces: PyTorch and ONNX Runtime differ by"):
        check(network, tmp_path, [batch(9)])


def test_nothing_to_compare_is_no_agreement(tmp_path: Path) -> None:
    network = decoder("gpt2")
    export_onnx(network, tmp_path, batch(9))
    with pytest.raises(ParityError, match="no samples"):
        check(network, tmp_path, [])


def test_of_many_texts_some_are_compared(tmp_path: Path) -> None:
    network = decoder("llama")
    export_onnx(network, tmp_path, batch(9))
    assert check(network, tmp_path, [batch(*[64] * 30)] * 2).samples == slot_parity.MOST_TOKENS // 64
