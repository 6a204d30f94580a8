"""Language models in float16: half the bytes, and what they predict stays what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.half import halve
from export.quantize import Quantization, quantize_judged
from export.slot_parity import Slots
from server.runtime.slots import GraphSlots
from server.settings import Settings
from tests.export.test_quantize import logits_of, network_of, texts, written


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
def test_half_precision_answers_as_before_in_half_the_bytes(family: str, tmp_path: Path) -> None:
    path = written(network_of(family), tmp_path)
    data = path.with_name("model.onnx.data")
    size, (text,) = data.stat().st_size, texts(1)
    before = logits_of(path, text)
    halve(path)
    onnx.checker.check_model(str(path))
    after = logits_of(path, text)
    assert after.dtype == np.float32
    assert 0 < np.abs(after - before).max() < 0.02 * np.abs(before).max()
    assert data.stat().st_size < 0.75 * size  # each tensor of these small ones begins at a page of its own
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    assert onnx.TensorProto.FLOAT not in {tensor.data_type for tensor in tensors}


def test_slots_are_of_half_the_bytes_too_and_a_server_reads_in_pieces(tmp_path: Path) -> None:
    path = written(network_of("llama"), tmp_path)
    (text,) = texts(1)
    expected = logits_of(path, text)[-1]
    halve(path)
    slots = GraphSlots(path, Settings(generation_slots=2), context=64)
    assert slots.dtype == np.float16
    slots.prefill(1, text[:7], 0, logits=False)
    found = slots.prefill(1, text[7:-1], 7, logits=True)
    assert found is not None
    slots.copy(1, 0, len(text) - 1)
    (found,) = slots.decode(text[-1:], np.array([len(text)], np.int32))
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_it_is_judged_like_fewer_bits(tmp_path: Path) -> None:
    path = written(network_of("llama"), tmp_path)
    figures = quantize_judged(path, Quantization("float16", 0.01, texts(), []), lambda words: None)
    assert figures["float16_perplexity"] == pytest.approx(figures["float32_perplexity"], rel=0.01)
    assert figures["float16_bytes"] < figures["float32_bytes"]


def test_a_weight_that_float16_cannot_hold_is_named_and_the_graph_stays(tmp_path: Path) -> None:
    network = network_of("llama")
    with torch.no_grad():
        network.get_parameter("decoder.model.layers.1.mlp.down_proj.weight")[0, 0] = 1e5
    path = written(network, tmp_path)
    with pytest.raises(ValueError, match=r"narrow1\.weight has 100,000"):
        halve(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert Slots(session, 1, 8).dtype == np.float32
