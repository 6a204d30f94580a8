"""Slots: what is computed in one row depends on that row alone, however it was computed."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import onnx
import pytest

from server.process import resident_bytes
from server.runtime.slot_memory import DeviceMemory, HostMemory
from server.runtime.slots import GraphSlots
from server.settings import Settings
from tests.server.slot_graphs import write_slot_graph

SETTINGS = Settings(providers=["CPUExecutionProvider"], intra_op_threads=1, generation_slots=6, generation_context=96)
RANDOM = np.random.default_rng(1)
PROMPTS = [RANDOM.integers(0, 61, size).tolist() for size in (5, 40, 1, 17, 80)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slot_graph(tmp_path_factory.mktemp("slots") / "model.onnx")


@pytest.fixture
def slots(path: Path) -> GraphSlots:
    return GraphSlots(path, SETTINGS, context=4096)


def alone(path: Path, tokens: list[int]) -> np.ndarray:
    """Logits after the tokens, by one run in a slot graph of its own."""
    found = GraphSlots(path, SETTINGS, context=96).prefill(0, tokens, 0, logits=True)
    assert found is not None
    return found.copy()


def test_its_sizes_are_the_graphs_and_the_settings(slots: GraphSlots) -> None:
    assert (slots.slots, slots.rows, slots.context, slots.vocabulary) == (6, 12, 96, 61)
    assert slots.tokens == 12 * 96


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_prompt_in_chunks_in_any_row_is_the_prompt_at_once(path: Path, slots: GraphSlots, chunk: int) -> None:
    for row, prompt in enumerate(PROMPTS):
        for start in range(0, len(prompt), chunk):
            piece = prompt[start : start + chunk]
            last = start + chunk >= len(prompt)
            found = slots.prefill(row + 1, piece, start, logits=last)
            assert (found is None) == (not last)
        np.testing.assert_allclose(found, alone(path, prompt), atol=1e-4)


def test_every_token_of_a_prompt_is_scored_by_those_before_it(path: Path, slots: GraphSlots) -> None:
    prompt = PROMPTS[1]
    found = np.concatenate([slots.score(3, prompt[start : start + 16], start) for start in range(0, len(prompt), 16)])
    expected = [alone(path, prompt[: end + 1]) for end in range(len(prompt))]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_new_prompts_of_different_lengths_together_are_each_alone(path: Path, slots: GraphSlots) -> None:
    found = slots.prefill_together(1, PROMPTS)
    np.testing.assert_allclose(found, [alone(path, prompt) for prompt in PROMPTS], atol=1e-4)


def test_a_step_of_rows_of_different_lengths(path: Path, slots: GraphSlots) -> None:
    sequences = [list(prompt) for prompt in PROMPTS]
    slots.prefill_together(0, sequences)
    for step in range(5):
        tokens = np.arange(5) + step
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.append(token)
        found = slots.decode(tokens, np.array([len(sequence) for sequence in sequences], np.int32)).copy()
        np.testing.assert_allclose(found, [alone(path, sequence) for sequence in sequences], atol=1e-4)


def test_a_copied_row_goes_on_as_its_source(path: Path, slots: GraphSlots) -> None:
    prompt = PROMPTS[1][:40]
    slots.prefill(2, prompt, 0, logits=False)
    slots.prefill(4, PROMPTS[4][:70], 0, logits=False)
    slots.copy(2, 4, 25)
    found = slots.prefill(4, prompt[25:], 25, logits=True)
    np.testing.assert_allclose(found, alone(path, prompt), atol=1e-4)


def test_memory_is_taken_by_what_is_written_and_given_back() -> None:
    memory = HostMemory(16, [(4, 4096, 64)] * 8, np.dtype(np.float32))  # 512 MiB in all
    before = resident_bytes()
    for buffer in memory.buffers:
        buffer[:, :, :16] = 1.0
    assert resident_bytes() - before < 32 * 2**20
    for buffer in memory.buffers:
        buffer[3] = 2.0
    taken = resident_bytes()
    memory.release(3, 1000)
    assert taken - resident_bytes() > 16 * 2**20
    for buffer in memory.buffers:
        assert (buffer[3, :, :1000] == 2.0).all()
        assert (buffer[2, :, :16] == 1.0).all()
        assert (buffer[4, :, :16] == 1.0).all()
    memory.release(3, 0)
    assert all((buffer[4, :, :16] == 1.0).all() for buffer in memory.buffers)
    assert resident_bytes() - before < 32 * 2**20 + 64 * mmap.PAGESIZE


def test_rows_on_a_device_are_copied_by_a_graph() -> None:
    memory = DeviceMemory(3, [(2, 5, 4), (1, 5, 8)], np.dtype(np.float32), "CPUExecutionProvider", "cpu")
    rows = [value.numpy() for value in memory.values]
    for value, row in zip(memory.values, rows, strict=True):
        row[:] = np.random.default_rng(0).standard_normal(row.shape)
        value.update_inplace(row)
    memory.copy(2, 0, 5)
    for value, row in zip(memory.values, rows, strict=True):
        np.testing.assert_array_equal(value.numpy(), row[[2, 1, 2]])


def test_slots_of_half_the_size(tmp_path: Path) -> None:
    """The graph says what is in them; logits are float32 all the same."""
    path = write_slot_graph(tmp_path / "model.onnx", half=True)
    slots = GraphSlots(path, SETTINGS, context=96)
    assert slots.dtype == np.float16
    sequences = [list(prompt) for prompt in PROMPTS]
    assert slots.prefill_together(0, sequences).dtype == np.float32
    slots.copy(1, 5, 40)
    for step in range(3):
        for sequence in sequences:
            sequence.append(step)
        found = slots.decode(np.full(5, step), np.array([len(sequence) for sequence in sequences], np.int32))
        for row, sequence in zip(found, sequences, strict=True):
            np.testing.assert_allclose(row, alone(path, sequence), atol=0.05)
    found_copied = slots.prefill(5, [0, 1, 2], 40, logits=True)
    np.testing.assert_allclose(found_copied, alone(path, sequences[1]), atol=0.05)


def test_another_graph_is_refused(tmp_path: Path) -> None:
    graph = onnx.load(write_slot_graph(tmp_path / "model.onnx"))
    graph.graph.output[1].name = "something"
    graph.graph.node.append(onnx.helper.make_node("Identity", ["next_past_keys0"], ["something"]))
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="no output next_past_keys0"):
        GraphSlots(tmp_path / "model.onnx", SETTINGS, context=96)
