"""Networks over series and texts: no padding is seen, and what matters in a sequence is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.onnx import export_onnx
from export.parity import check
from models import registry
from models.convnet1d import StepNorm
from models.network import Network
from models.spec import Classification, ModelSpec

SERIES = {"channels": 2, "width": 8}
TEXT = {"vocabulary": 261, "embedding": 8, "width": 8}
ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("rnn", SERIES),
    ("lstm", {**TEXT, "layers": 2}),
    ("gru", {**SERIES, "bidirectional": True}),
    ("convnet1d", SERIES),
    ("convnet1d", TEXT),
]


def network_of(architecture: str, hyperparameters: dict[str, Any], classes: int = 3) -> Network:
    torch.manual_seed(0)
    return registry.build(
        ModelSpec(architecture=architecture, hyperparameters=hyperparameters, task=Classification(classes))
    )


def sequences(text: bool, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The first row is full, the others are not; behind their ends is noise."""
    random = torch.Generator().manual_seed(length)
    lengths = torch.randint(1, length + 1, (batch,), generator=random)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    if text:
        return torch.randint(5, 261, (batch, length), generator=random), mask
    return torch.randn(batch, length, 2, generator=random), mask


@pytest.mark.parametrize(("architecture", "hyperparameters"), ARCHITECTURES)
def test_a_row_alone_gives_what_it_gives_in_a_padded_batch(architecture: str, hyperparameters: dict[str, Any]) -> None:
    network = network_of(architecture, hyperparameters).eval()
    sequence, mask = sequences("vocabulary" in hyperparameters, 5, 9)
    together = network(sequence, mask)["logits"]
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = network(sequence[row : row + 1, :length], mask[row : row + 1, :length])["logits"]
        torch.testing.assert_close(together[row], alone[0])
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("architecture", "hyperparameters"), ARCHITECTURES)
def test_every_parameter_is_in_one_block_and_learns_whatever_the_padding(
    architecture: str, hyperparameters: dict[str, Any]
) -> None:
    network = network_of(architecture, hyperparameters).train()
    sequence, mask = sequences("vocabulary" in hyperparameters, 5, 9)
    target = torch.tensor([0, 1, 2, 0, 1])

    def gradients(sequence: Tensor, mask: Tensor) -> list[Tensor]:
        network.zero_grad()
        torch.nn.functional.cross_entropy(network(sequence, mask)["logits"], target).backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    found = gradients(sequence, mask)
    more = torch.cat([sequence, sequence[:, :3]], dim=1), torch.cat([mask, torch.zeros_like(mask[:, :3])], dim=1)
    for one, other in zip(found, gradients(*more), strict=True):
        torch.testing.assert_close(one, other)
    assert len(found) == len(list(network.parameters()))
    blocks = [parameter for _, block in network.blocks() for parameter in block.parameters()]
    assert sorted(map(id, blocks)) == sorted(map(id, network.trunk.parameters()))


@pytest.mark.parametrize(
    ("architecture", "hyperparameters"),
    [
        pytest.param(*ARCHITECTURES[0], marks=pytest.mark.slow),
        pytest.param(*ARCHITECTURES[1], marks=pytest.mark.slow),
        pytest.param(*ARCHITECTURES[2]),
        pytest.param(*ARCHITECTURES[3]),
        pytest.param(*ARCHITECTURES[4], marks=pytest.mark.slow),
    ],
)
def test_the_graph_computes_the_same_at_any_batch_and_length(
    architecture: str, hyperparameters: dict[str, Any], tmp_path: Path
) -> None:
    network = network_of(architecture, hyperparameters)
    batches = []
    for shape in ((3, 7), (5, 16), (2, 1)):
        sequence, mask = sequences("vocabulary" in hyperparameters, *shape)
        batches.append({network.input_names[0]: sequence.numpy(), "attention_mask": mask.numpy()})
    export_onnx(network, tmp_path, batches[0])
    parity = check(network, tmp_path, batches)
    assert {1, 3, 5} <= set(parity.batch_sizes)
    assert {1, 3, 7, 12, 16} <= set(parity.lengths)


def test_batch_norm_takes_the_statistics_of_real_steps() -> None:
    norm = StepNorm(1, momentum=1.0)
    x, mask = (
        torch.tensor([[[1.0, 2.0, 99.0], [3.0, 99.0, 99.0]]]).transpose(0, 1),
        torch.tensor([[1, 1, 0], [1, 0, 0]]),
    )
    normed = norm.masked(x, mask.bool())
    assert norm.running_mean is not None
    assert norm.running_mean.item() == pytest.approx(2.0)
    assert normed[mask.bool().unsqueeze(1)].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert not normed[~mask.bool().unsqueeze(1)].any()


def test_a_series_is_standardized_by_its_real_steps() -> None:
    network = network_of("gru", SERIES)
    series, mask = sequences(False, 5, 9)
    network.measure(lambda: [series, mask], torch.zeros(5))
    standardize = network.get_submodule("trunk.first.standardize")
    real = series[mask.bool()]
    torch.testing.assert_close(standardize.mean, real.mean(0))
    torch.testing.assert_close(standardize.std, real.std(0, correction=0))


@pytest.mark.parametrize("architecture", ["rnn", "lstm", "gru"])
def test_what_came_first_is_remembered_to_the_end(architecture: str) -> None:
    """The class is the sign of the first of twelve steps; all others are noise (after Hochreiter and Schmidhuber)."""
    network = network_of(architecture, {"channels": 1, "width": 16}, classes=2).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    random = torch.Generator().manual_seed(0)
    mask = torch.ones(64, 12, dtype=torch.long)
    for _ in range(150):
        series = torch.randn(64, 12, 1, generator=random)
        target = (series[:, 0, 0] > 0).long()
        logits = network(series, mask)["logits"]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()
    assert (logits.argmax(1) == target).float().mean() > 0.9


@pytest.mark.parametrize("hyperparameters", [{}, {"channels": 1, "vocabulary": 300}])
def test_what_is_read_must_be_one_thing(hyperparameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`channels` .* or `vocabulary`"):
        network_of("gru", hyperparameters)


def test_words_that_are_left_out_do_not_shorten_a_text() -> None:
    network = network_of("gru", TEXT).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = network(ids, torch.ones_like(ids))["embedding"]
    holed = torch.tensor([[1, 0, 1, 1]])
    found = network(ids, holed)["embedding"]
    ids[0, 1] = 30
    assert torch.equal(found, network(ids, holed)["embedding"]), "what is left out has no say"
    ids[0, 3] = 30
    assert not torch.allclose(found, network(ids, holed)["embedding"], atol=1e-3), "the last word has"
    assert not torch.allclose(found, whole, atol=1e-3)
