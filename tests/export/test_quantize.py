"""Quantized language models: what MatMulNBits computes is what the blocks stand for, and what is lost is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn.functional import cross_entropy

import export.quantize
from export.blocks import BLOCK, Blocks, blocks, numbers
from export.decoder import write_decoder
from export.perplexity import judge, texts_of
from export.quantize import Quantization, TooMuchLost, quantize, quantize_judged
from export.rounding import moments, rounded
from export.slot_parity import Slots
from models import registry
from models.decoder_parts import LanguageNetwork
from models.spec import LanguageModel, ModelSpec
from tests.models.test_decoder_weights import FAMILIES

WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}


def network_of(family: str, seed: int = 0) -> LanguageNetwork:
    """A decoder whose matrices are several blocks wide, one of them not a whole number of blocks."""
    config = FAMILIES[family].to_dict() | (WIDE if family != "gpt2" else {"n_embd": 64})
    spec = ModelSpec(architecture="causal_decoder", hyperparameters={"config": config}, task=LanguageModel())
    network = registry.build(spec)
    assert isinstance(network, LanguageNetwork)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return network.eval()


def written(network: LanguageNetwork, folder: Path) -> Path:
    write_decoder(network.parts(), folder / "model.onnx")
    return folder / "model.onnx"


def texts(count: int = 4, length: int = 40) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(3, 300, length - i) for i in range(count)]


def logits_of(path: Path, text: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return Slots(session, 1, 64).run(0, text[None], np.array([len(text)]), np.arange(len(text)))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_block_is_off_by_half_a_step_at_most(bits: int) -> None:
    random = np.random.default_rng(0)
    matrix = random.normal(size=(7, 3 * BLOCK + 5)).astype(np.float32)
    matrix[0, :BLOCK] = 0.0
    matrix[1, :BLOCK] = np.abs(matrix[1, :BLOCK]) + 3.0
    kept = blocks(matrix, bits)
    assert kept.values.shape == (7, 4, BLOCK * bits // 8)
    assert kept.zeros.shape == (7, 4 * bits // 8)
    found = numbers(kept, matrix.shape[1], bits)
    step = np.repeat(kept.scales, BLOCK, axis=1)[:, : matrix.shape[1]]
    assert (np.abs(found - matrix) <= 1.001 * step).all()
    assert np.abs(found - matrix).mean() < 0.3 * step.mean()
    assert not found[0, :BLOCK].any()
    exact = np.clip(np.round(matrix * 2.0) / 2.0, -4.0, 3.5)
    exact[:, ::BLOCK], exact[:, 1::BLOCK] = -4.0, 3.5  # 16 numbers, half apart
    np.testing.assert_allclose(numbers(blocks(exact, 4), matrix.shape[1], 4)[:, :-5], exact[:, :-5], atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_graph_computes_what_its_blocks_stand_for(
    family: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network whose weights are what the blocks stand for answers as the quantized graph does where that keeps its
    states as floats."""
    monkeypatch.setattr(export.quantize, "ACCURACY", 0)
    network = network_of(family)
    path = written(network, tmp_path)
    size = path.with_name("model.onnx.data").stat().st_size
    (text,) = texts(1)
    before = logits_of(path, text)
    quantize(path, bits)
    onnx.checker.check_model(str(path))
    after = logits_of(path, text)
    kinds = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= kinds
    assert "MatMul" not in kinds
    assert path.with_name("model.onnx.data").stat().st_size < 0.6 * size
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if tensor.ndim > 1 and "wpe" not in name:
                layer = name.split(".")[-2]
                fine = layer in ("embed_tokens", "wte", "lm_head", "q_proj", "k_proj", "v_proj", "c_attn")
                turned = "c_attn" in name or "c_fc" in name or "c_proj" in name
                values = (tensor.T if turned else tensor).contiguous().numpy()
                rounded = numbers(blocks(values, 8 if fine else bits), values.shape[1], 8 if fine else bits)
                tensor.copy_(torch.from_numpy(rounded.T if turned else rounded))
        whole = network(torch.from_numpy(text)[None], torch.ones(1, len(text), dtype=torch.int64))["logits"][0].numpy()
    np.testing.assert_allclose(after, whole, atol=1e-4 * np.abs(whole).max())
    assert 1e-3 < np.abs(before - after).mean() / before.std() < (0.02 if bits == 8 else 0.4)


def test_columns_make_up_for_each_other() -> None:
    """On states that go together, the answers are missed by less than half as much as by rounding to the nearest."""
    random = np.random.default_rng(0)
    width = 3 * BLOCK - 7
    together = np.exp(-np.abs(np.subtract.outer(np.arange(width), np.arange(width))) / 20)
    states = (random.normal(size=(500, width)) @ together).astype(np.float32)
    states[:, 5] = 0.0  # never seen, so that it may be anything
    matrix = random.normal(size=(40, width)).astype(np.float32)
    learned, new = states[:400], states[400:]

    def missed(kept: Blocks) -> float:
        return float(np.square(new @ (numbers(kept, width, 4) - matrix).T).mean())

    kept = rounded(matrix, learned.T @ learned, 4)
    assert missed(kept) < 0.5 * missed(blocks(matrix, 4))
    alone = rounded(matrix, np.eye(width, dtype=np.float32), 4)
    np.testing.assert_array_equal(alone.values, blocks(matrix, 4).values)
    np.testing.assert_array_equal(alone.zeros, blocks(matrix, 4).zeros)


def test_moments_are_those_of_the_states(tmp_path: Path) -> None:
    network = network_of("llama")
    path = written(network, tmp_path)
    before = sorted(file.name for file in tmp_path.iterdir())
    found = moments(path, ["norm", "gated0"], texts(), lambda: None)
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    expected = {"norm": np.zeros((64, 64)), "gated0": np.zeros((96, 96))}
    decoder = network.get_submodule("decoder.model")
    for name, module, entering in (("norm", "norm", False), ("gated0", "layers.0.mlp.down_proj", True)):

        def add(_: object, given: tuple[torch.Tensor], answer: torch.Tensor) -> None:
            states = (given[0] if entering else answer)[0].numpy()  # noqa: B023 - called within this turn
            expected[name] += states.T @ states  # noqa: B023

        handle = decoder.get_submodule(module).register_forward_hook(add)
        with torch.no_grad():
            for text in texts():
                network(torch.from_numpy(text)[None], torch.ones(1, len(text), dtype=torch.int64))
        handle.remove()
    for name, moment in found.items():
        np.testing.assert_allclose(moment, expected[name], atol=1e-4 * np.abs(expected[name]).max())


@pytest.mark.parametrize("room", [2**29, 2**15])
def test_4_bits_that_are_rounded_for_texts_answer_better_on_others(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few matrices there is memory for at once."""
    monkeypatch.setattr(export.quantize, "MOMENT_BYTES", room)
    text, *usual = texts(24)

    def lost(learned: list[np.ndarray]) -> float:
        path, done = written(network_of("llama"), tmp_path), []
        before = logits_of(path, text)
        quantize(path, 4, learned, lambda count, of: done.append((count, of)))
        assert done[-1] == (9, 9)
        assert done == sorted(done)
        return float(np.square(before - logits_of(path, text)).mean())

    assert lost(usual) < 0.9 * lost([])


def test_states_of_8_bits_lose_little(tmp_path: Path) -> None:
    path = written(network_of("llama"), tmp_path)
    (text,) = texts(1)
    before = logits_of(path, text)
    quantize(path, 8)
    assert np.abs(before - logits_of(path, text)).mean() < 0.02 * before.std()


def test_a_table_that_is_tied_is_kept_once(tmp_path: Path) -> None:
    """llama's is, qwen2's is not: in 8 bits that is a byte for each number of it and a little more."""
    sizes = {}
    for family in ("llama", "qwen2"):
        (tmp_path / family).mkdir()
        path = written(network_of(family), tmp_path / family)
        quantize(path, 8)
        names = [one.name for one in onnx.load(path, load_external_data=False).graph.initializer]
        sizes[family] = sum(name.startswith(("token_table", "head")) and name.endswith(".values") for name in names)
    assert sizes == {"llama": 1, "qwen2": 2}


def test_perplexity_is_pytorchs(tmp_path: Path) -> None:
    network = network_of("mistral")
    rows = [*texts(3), np.random.default_rng(1).integers(3, 300, 60)]
    found = judge(written(network, tmp_path), rows, lambda done, of: None)
    total = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(row)[None]
            logits = network(ids, torch.ones_like(ids))["logits"][0, :-1]
            total += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    count = sum(len(row) - 1 for row in rows)
    assert found.tokens == count
    assert found.perplexity == pytest.approx(np.exp(total / count), rel=1e-4)
    assert found.tokens_per_second > 0
    assert found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_texts_are_those_of_the_batches_cut_where_there_are_enough() -> None:
    ids = np.arange(12).reshape(3, 4)
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    found = [text.tolist() for text in texts_of([{"input_ids": ids, "attention_mask": mask}], 6)]
    assert found == [[0, 1, 2], [8, 9]], "one token alone predicts nothing"


def test_what_is_lost_is_told_and_too_much_is_refused(tmp_path: Path) -> None:
    path = written(network_of("llama"), tmp_path)
    told: list[str] = []
    figures = quantize_judged(path, Quantization("int8", 0.05, texts(), []), told.append)
    assert figures["int8_perplexity"] == pytest.approx(figures["float32_perplexity"], rel=0.05)
    assert figures["int8_bytes"] < 0.6 * figures["float32_bytes"]
    assert figures["held_out_tokens"] == sum(len(text) - 1 for text in texts())
    assert any("perplexity on 150 held-out tokens" in words for words in told)
    other = written(network_of("llama"), tmp_path)
    with pytest.raises(TooMuchLost, match=r"int4: perplexity .* 1e-08 are allowed\. Nothing is published: take int8"):
        # Of random texts a model that is worse may know more: what it predicts well here are its own likeliest tokens.
        quantize_judged(other, Quantization("int4", 1e-10, own_texts(other), []), told.append)
    with pytest.raises(ValueError, match="no held-out texts"):
        quantize_judged(other, Quantization("int4", 0.1, [], texts()), told.append)


def own_texts(path: Path) -> list[np.ndarray]:
    """What the graph itself would write, token by token."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for begin in (5, 9, 20):
        slots, text = Slots(session, 1, 64), [begin]
        while len(text) < 40:
            logits = slots.run(0, np.array([[text[-1]]]), np.array([len(text)]), np.zeros(1, np.int64))
            text.append(int(logits[0].argmax()))
        found.append(np.array(text))
    return found
