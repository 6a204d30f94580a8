"""Monte-Carlo dropout with fixed masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.onnx import export_onnx
from export.parity import check
from models import registry
from models.mc_dropout import McDropout, mc_dropout
from models.network import Headed, Network, Trunk
from models.spec import Classification, ModelSpec, Regression
from tests.models.settled import settle


class Linear(Trunk):
    """Two linear layers with dropout between, and no activation."""

    input_names = ("vector",)
    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 10)
        self.two = nn.Linear(10, 6)
        self.dropout = nn.Dropout(0.4)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [("one", self.one), ("two", self.two)]

    def forward(self, vector: Tensor) -> Tensor:
        found: Tensor = self.two(self.dropout(self.one(vector)))
        return found


def linear() -> Headed:
    torch.manual_seed(0)
    return Headed(ModelSpec(architecture="mlp", task=Regression(2)), Linear(), dropout=0.0).eval()


def network_of(architecture: str, **hyperparameters: Any) -> Network:
    torch.manual_seed(0)
    task = Classification(3)
    spec = ModelSpec(architecture=architecture, hyperparameters=hyperparameters, task=task)
    return registry.build(spec).eval()


def mlp(**hyperparameters: Any) -> Network:
    return network_of("mlp", features=4, hidden=[16, 12], **{"dropout": 0.5, "input_dropout": 0.2, **hyperparameters})


@pytest.mark.parametrize("passes", [5, 32])
def test_of_a_linear_network_the_mean_is_exactly_what_it_answers_without_dropout(passes: int) -> None:
    plain, vectors = linear(), torch.randn(20, 4)
    expected = plain(vectors)["value"]
    found = mc_dropout(linear(), passes, 1, {"vector": vectors})(vectors)
    torch.testing.assert_close(found["value"], expected, atol=1e-5, rtol=1e-5)
    assert found["uncertainty"].mean() > 0.05


def test_the_deviation_of_a_linear_network_is_the_analytic_one() -> None:
    """Var of Σ w_j m_j h_j with independent m_j of mean 1 and variance p / (1 - p) is Σ (w_j h_j)² p / (1 - p)."""
    plain, vectors = linear(), torch.randn(20, 4)
    trunk, head = plain.trunk, plain.head
    assert isinstance(trunk, Linear)
    assert head is not None
    with torch.no_grad():
        weights = head.get_submodule("linear").weight @ trunk.two.weight
        variance = ((weights[None] * trunk.one(vectors)[:, None]) ** 2).sum(-1) * (0.4 / 0.6)
        found = mc_dropout(plain, 250, 1, {"vector": vectors}).eval()(vectors)["uncertainty"]
    assert float((found / variance.sqrt()).mean()) == pytest.approx(1.0, abs=0.03)


def test_masks_drop_the_rate_of_their_layer_and_of_every_unit() -> None:
    network = mc_dropout(mlp(), 40, 1, {"vector": torch.randn(2, 4)})
    masks = [getattr(network, f"mask{i}") for i in range(3)]
    assert [list(mask.shape) for mask in masks] == [[40, 4], [40, 16], [40, 12]]
    for mask, rate in zip(masks, (0.2, 0.5, 0.5), strict=True):
        assert ((mask == 0).float().mean(0) == rate).all()
        torch.testing.assert_close(mask.mean(0), torch.ones(mask.shape[1]))
    assert len({tuple(row) for row in masks[1].T.tolist()}) > 10, "units are dropped independently"


def test_the_same_input_has_the_same_answer_whatever_else_is_in_the_batch() -> None:
    network, vectors = mc_dropout(mlp(), 16, 1, {"vector": torch.randn(2, 4)}).eval(), torch.randn(7, 4)
    together = network(vectors)["logits"]
    for row in range(7):
        torch.testing.assert_close(network(vectors[row : row + 1])["logits"][0], together[row])
    other = mc_dropout(mlp(), 16, 2, {"vector": torch.randn(2, 4)}).eval()
    assert (other(vectors)["logits"] - together).abs().max() > 1e-3


def test_a_pass_is_the_network_with_its_units_left_out() -> None:
    member = mlp(dropout=0.5, input_dropout=0.0)
    vectors = torch.randn(5, 4)
    network = mc_dropout(mlp(dropout=0.5, input_dropout=0.0), 3, 1, {"vector": vectors}).eval()
    probabilities = []
    first, second = (layer for _, layer in member.blocks())
    standardized = member.get_submodule("trunk.standardize")(vectors)
    for i in range(3):
        units = first(standardized) * network.get_buffer("mask0")[i]
        units = second(units) * network.get_buffer("mask1")[i]
        probabilities.append(member.get_submodule("head")(units).softmax(1))
    torch.testing.assert_close(network(vectors)["logits"].softmax(1), torch.stack(probabilities).mean(0))


def test_training_drops_anew_at_every_step_and_batch_norms_stay_in_evaluation_when_it_answers() -> None:
    vectors = torch.randn(5, 4)
    network = mc_dropout(mlp(), 8, 1, {"vector": vectors}).train()
    assert (network(vectors)["logits"] - network(vectors)["logits"]).abs().max() > 1e-3
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    vgg = network_of("vgg", image_size=32, width=0.1, depth=11, dropout=0.3)
    settle(vgg, images)
    wrapped = mc_dropout(vgg, 4, 1, {"pixels": images}).eval()
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    wrapped(images)
    assert all(torch.equal(before[name], value) for name, value in wrapped.state_dict().items())
    assert not any(one.training for one in wrapped.modules())


def test_what_lies_before_all_dropout_runs_once() -> None:
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    network = mc_dropout(network_of("lenet5", dropout=0.5), 8, 1, {"pixels": images}).eval()
    rows = []
    network.member.trunk.register_forward_hook(lambda _, given, found: rows.append(len(given[0])))
    assert network(images)["logits"].shape == (2, 3)
    assert rows == [2]


@pytest.mark.parametrize(
    ("architecture", "hyperparameters"),
    [
        ("mlp", {"features": 4, "hidden": [8, 8], "dropout": 0.5, "input_dropout": 0.2}),
        ("gru", {"vocabulary": 50, "embedding": 6, "width": 8, "dropout": 0.3}),
        pytest.param("vgg", {"image_size": 32, "width": 0.1, "depth": 11, "dropout": 0.3}, marks=pytest.mark.slow),
    ],
)
def test_it_comes_back_from_its_file_and_its_graph_computes_the_same(
    architecture: str, hyperparameters: dict[str, Any], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    mask = np.arange(9) < np.array([9, 4, 1])[:, None]
    batch: dict[str, np.ndarray] = {
        "mlp": {"vector": random.normal(size=(3, 4)).astype(np.float32)},
        "gru": {"input_ids": random.integers(4, 50, (3, 9)) * mask, "attention_mask": mask.astype(np.int64)},
        "vgg": {"pixels": random.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)},
    }[architecture]
    inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
    plain = network_of(architecture, **hyperparameters)
    if architecture == "vgg":
        settle(plain, *inputs.values())
    network = mc_dropout(plain, 6, 1, inputs).eval()
    registry.save(network, tmp_path)
    again = registry.restore(tmp_path).eval()
    assert isinstance(again, McDropout)
    with torch.no_grad():
        expected, found = (one(*inputs.values()) for one in (network, again))
    assert expected["uncertainty"].max() > 1e-4
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    export_onnx(again, tmp_path, batch)
    parity = check(again, tmp_path, [batch])
    assert {1, 3, 6} <= set(parity.batch_sizes)
    if architecture == "gru":
        assert {3, 9, 14} <= set(parity.lengths)


def test_a_network_that_drops_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="mlp drops nothing"):
        mc_dropout(mlp(dropout=0.0, input_dropout=0.0), 8, 1, {"vector": torch.randn(2, 4)})
