"""Objectives of the output heads: their gradients against hand formulas, and what they make a network learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.processing.inputs import VectorInput
from finetune import recipe
from finetune.automatic import Chosen
from finetune.data.targets import Targets
from finetune.objectives import choice, conformal
from finetune.objectives.binary_cross_entropy import BinaryCrossEntropy
from finetune.objectives.multi_label import MultiLabel
from finetune.objectives.numbers import AbsoluteError, Gaussian, Numbers, SquaredError
from finetune.origin import Reading
from finetune.preprocess import Items
from models import registry
from models.network import Network
from models.spec import ModelSpec, Regression
from tests.finetune import small

SCALE = torch.tensor([2.0, 0.5])


def gradient(loss: Tensor, of: Tensor) -> np.ndarray:
    (found,) = torch.autograd.grad(loss, of)
    return found.numpy()


def leaf(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def test_the_gradient_of_binary_cross_entropy_is_the_weighted_miss() -> None:
    x, y = np.array([[-3.0], [0.2], [5.0], [1.0]]), np.array([0, 1, 0, 1])
    logits = leaf(x)
    loss = BinaryCrossEntropy(positive_weight=3.0).loss({"logits": logits}, torch.from_numpy(y))
    expected = np.where(y[:, None] == 1, 3.0, 1.0) * (sigmoid(x) - y[:, None])
    np.testing.assert_allclose(gradient(loss, logits), expected, rtol=1e-5)
    same = nn.functional.binary_cross_entropy_with_logits(
        logits[:, 0], torch.from_numpy(y).float(), pos_weight=torch.tensor(3.0), reduction="sum"
    )
    assert float(loss.detach()) == pytest.approx(float(same.detach()), rel=1e-6)


def test_binary_cross_entropy_of_a_hopeless_answer_is_finite_and_still_teaches() -> None:
    logits = leaf([[200.0], [-200.0]])
    loss = BinaryCrossEntropy().loss({"logits": logits}, torch.tensor([0, 1]))
    assert float(loss.detach()) == 400.0
    assert gradient(loss, logits).ravel().tolist() == [1.0, -1.0]


def test_weights_of_binary_targets_add_up_over_any_batches() -> None:
    objective, targets = BinaryCrossEntropy(positive_weight=2.5), torch.tensor([0, 1, 1, 0, 1])
    assert objective.weight(targets) == 2 + 3 * 2.5
    assert objective.weight(targets[:2]) + objective.weight(targets[2:]) == objective.weight(targets)


def test_the_gradient_of_many_sigmoids() -> None:
    x, y = np.array([[1.0, -2.0, 0.0], [90.0, 3.0, -90.0]]), np.array([[1.0, 0, 0], [0, 1, 1]])
    logits = leaf(x)
    loss = MultiLabel(["a", "b", "c"]).loss({"logits": logits}, torch.tensor(y, dtype=torch.float32))
    np.testing.assert_allclose(gradient(loss, logits), (sigmoid(x) - y) / 3, rtol=1e-5, atol=1e-7)
    assert float(loss.detach()) == pytest.approx(
        float(nn.functional.binary_cross_entropy_with_logits(logits.detach(), torch.tensor(y), reduction="sum")) / 3,
        rel=1e-6,
    )


def test_the_gradients_of_squared_and_absolute_errors_are_in_deviations_of_each_target() -> None:
    y = np.array([[1.0, 1.0], [0.0, 3.0]])
    x = np.array([[3.0, 0.5], [-1.0, 5.0]])
    scale = SCALE.numpy()
    for objective, expected in (
        (SquaredError(SCALE), 2 * (x - y) / scale**2 / 2),
        (AbsoluteError(SCALE), np.sign(x - y) / scale / 2),
    ):
        value = leaf(x)
        loss = objective.loss({"value": value}, torch.tensor(y, dtype=torch.float32))
        np.testing.assert_allclose(gradient(loss, value), expected, rtol=1e-6)


def test_the_gradients_of_the_normal_likelihood() -> None:
    y, x, s = np.array([[1.0, 1.0]]), np.array([[3.0, 0.5]]), np.array([[0.7, 4.0]])
    value, deviation = leaf(x), leaf(s)
    outputs = {"value": value, "deviation": deviation}
    loss = Gaussian(SCALE).loss(outputs, torch.tensor(y, dtype=torch.float32))
    np.testing.assert_allclose(
        gradient(Gaussian(SCALE).loss(outputs, torch.tensor(y).float()), value), (x - y) / s**2 / 2, rtol=1e-5
    )
    np.testing.assert_allclose(gradient(loss, deviation), (1 / s - (x - y) ** 2 / s**3) / 2, rtol=1e-5)
    # In the scale of the deviations, the likelihood is that of scipy's normal distribution.
    from scipy.stats import norm

    scale = SCALE.numpy()
    expected = -norm.logpdf(y / scale, x / scale, s / scale).mean()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [SquaredError, AbsoluteError, Gaussian])
def test_a_number_that_is_missing_teaches_nothing(kind: type[Numbers]) -> None:
    value, deviation = leaf([[3.0, 0.5], [1.0, 1.0]]), leaf([[1.0, 1.0], [2.0, 2.0]])
    outputs = {"value": value, "deviation": deviation}
    some = kind(SCALE).loss(outputs, torch.tensor([[1.0, math.nan], [math.nan, math.nan]]))
    found = gradient(some, value)
    assert np.isfinite(found).all()
    assert found[0, 0] != 0.0
    assert found.ravel()[1:].tolist() == [0.0, 0.0, 0.0]
    assert math.isfinite(float(some.detach()))


SEVERAL = recipe.MultiTask(
    heads={
        "kind": recipe.Head(objective=recipe.CrossEntropy(label_smoothing=0.1)),
        "side": recipe.Head(objective=recipe.BinaryCrossEntropy(positive_weight=2.0), weight=0.5),
        "tags": recipe.Head(objective=recipe.MultiLabel(), weight=2.0),
        "size": recipe.Head(objective=recipe.Gaussian(), columns=("width", "height"), weight=3.0),
    }
)
READING = Reading(spec=ModelSpec(architecture="mlp"), input=VectorInput(features=1))
ANSWERS = np.array(
    [
        # kind, side, three tags, width and height
        [0, 1, 1, 0, 0, 1.0, 10.0],
        [2, math.nan, 0, 1, 1, 2.0, math.nan],
        [math.nan, 0, math.nan, math.nan, math.nan, 4.0, 5.0],
        [1, 1, 0, 0, 0, math.nan, math.nan],
        [math.nan, math.nan, 1, 1, 0, 3.0, 8.0],
    ],
    np.float32,
)


def several() -> Any:
    heads = {"kind": ["a", "b", "c"], "side": ["l", "r"], "tags": ["x", "y", "z"], "size": ["width", "height"]}
    return choice.build(SEVERAL, Targets([], ANSWERS, np.zeros(5, np.int64), heads), ANSWERS, READING)


def outputs_of_several() -> dict[str, Tensor]:
    torch.manual_seed(0)
    widths = {"logits_kind": 3, "logits_side": 1, "logits_tags": 3, "value_size": 2, "deviation_size": 2}
    found = {name: torch.randn(5, width) for name, width in widths.items()}
    found["deviation_size"] = found["deviation_size"].exp()
    return {name: value.requires_grad_() for name, value in found.items()}


def test_several_heads_are_the_weighted_sum_of_each_on_what_is_labelled_for_it() -> None:
    objective, outputs, answers = several(), outputs_of_several(), torch.from_numpy(ANSWERS)
    x = {name: value.detach().double().numpy() for name, value in outputs.items()}
    log_p = x["logits_kind"] - np.log(np.exp(x["logits_kind"]).sum(axis=1, keepdims=True))
    smoothed = 0.9 * np.eye(3)[[0, 2, 1]] + 0.1 / 3
    expected = -(smoothed * log_p[[0, 1, 3]]).sum()
    side = x["logits_side"][[0, 2, 3], 0]
    expected += 0.5 * (2 * np.log1p(np.exp(-side[[0, 2]])).sum() + np.log1p(np.exp(side[1])))
    rows = [0, 1, 3, 4]
    tags = x["logits_tags"][rows]
    expected += 2.0 * (np.log1p(np.exp(tags)) - ANSWERS[rows, 2:5] * tags).sum() / 3
    scale = np.nanstd(ANSWERS[:, 5:].astype(np.float64), axis=0)
    z = (x["value_size"] - ANSWERS[:, 5:]) / x["deviation_size"]
    nll = 0.5 * z**2 + np.log(x["deviation_size"] / scale) + 0.5 * np.log(2 * np.pi)
    expected += 3.0 * np.nansum(nll) / 2
    assert float(objective.loss(outputs, answers).detach()) == pytest.approx(expected, rel=1e-5)
    assert objective.weight(answers) == 5.0


def test_sums_over_batches_of_several_heads_add_up_to_the_whole() -> None:
    objective, outputs, answers = several(), outputs_of_several(), torch.from_numpy(ANSWERS)
    parts = [
        float(objective.loss({name: value[rows] for name, value in outputs.items()}, answers[rows]).detach())
        for rows in (slice(0, 1), slice(1, 3), slice(3, 5))
    ]
    assert sum(parts) == pytest.approx(float(objective.loss(outputs, answers).detach()), rel=1e-6)


def test_an_empty_cell_teaches_its_head_nothing() -> None:
    objective, outputs, answers = several(), outputs_of_several(), torch.from_numpy(ANSWERS)
    loss = objective.loss(outputs, answers)
    found = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    silent = {
        "logits_kind": [2, 4],
        "logits_side": [1, 4],
        "logits_tags": [2],
        "value_size": [3],
        "deviation_size": [3],
    }
    for name, value in found.items():
        assert value.isfinite().all()
        moved = {row for row in range(5) if value[row].abs().sum() > 0}
        assert moved == set(range(5)) - set(silent[name]), name
    assert found["value_size"][1].tolist()[1] == 0.0, "of the two numbers of item 1 one is missing"


def test_figures_of_heads_are_called_by_their_names() -> None:
    objective = several()
    assert {"kind.accuracy", "side.roc_auc", "tags.micro_f1", "size.mae"} <= set(objective.metrics)
    assert objective.falling == {"size.mae", "size.rmse"}
    kept = {
        name: value.numpy()
        for name, value in objective.kept(
            {n: v.detach() for n, v in outputs_of_several().items()}, torch.from_numpy(ANSWERS)
        ).items()
    }
    figures = objective.report(kept, ANSWERS).figures()
    assert set(objective.metrics) <= figures.keys()
    assert all(math.isfinite(value) for value in figures.values())


def test_a_head_without_a_label_to_learn_from_is_refused() -> None:
    answers = ANSWERS.copy()
    answers[:, 1] = math.nan
    heads = {"kind": ["a", "b", "c"], "side": ["l", "r"], "tags": ["x", "y", "z"], "size": ["width", "height"]}
    with pytest.raises(ValueError, match="head 'side': none of the training items"):
        choice.build(SEVERAL, Targets([], answers, np.zeros(5, np.int64), heads), answers, READING)


def numbers(spread: str = "none", features: int = 1, hidden: tuple[int, ...] = (16,)) -> Network:
    torch.manual_seed(0)
    hyperparameters = {"features": features, "hidden": hidden, "activation": "tanh"}
    task = Regression(1, spread)  # type: ignore[arg-type]
    return registry.build(ModelSpec(architecture="mlp", hyperparameters=hyperparameters, task=task))


def items_of(vectors: np.ndarray, targets: np.ndarray) -> Items:
    columns = vectors.astype(np.float32)
    return Items(
        targets.astype(np.float32)[:, None], None, np.arange(len(targets)), lambda rows: {"vector": columns[rows]}
    )


def learned(network: Network, items: Items, kind: type[Numbers], folder: Path, epochs: int) -> Network:
    """`network` after training on all but the last 100 of `items`."""
    targets = torch.from_numpy(items.targets)
    network.measure(lambda: [torch.from_numpy(items.batch(np.arange(len(items)))["vector"])], targets)
    small.fit(
        network,
        items,
        folder,
        chosen=Chosen(epochs=epochs, batch_size=100, learning_rate=0.02),
        objective=kind(targets.std(dim=0)),
        held_out=100,
        optimizer=recipe.Adam(),
    )
    return network.eval()


def test_a_normal_head_recovers_a_known_deviation_that_differs_from_place_to_place(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, 3000)
    deviation = np.where(x > 0, 30.0, 5.0)
    items = items_of(x[:, None], 1000.0 + 50.0 * x + deviation * random.normal(size=3000))
    network = learned(numbers("gaussian"), items, Gaussian, tmp_path, epochs=25)
    with torch.no_grad():
        found = network(torch.tensor([[-0.5], [0.5]]))
    assert found["value"].ravel().tolist() == pytest.approx([975.0, 1025.0], abs=6.0)
    assert found["deviation"].ravel().tolist() == pytest.approx([5.0, 30.0], rel=0.15)


def test_absolute_errors_learn_the_median_and_squared_ones_the_mean(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 2, 4000).astype(np.float64)
    skewed = random.exponential(np.where(x == 1, 40.0, 10.0))  # mean 40 or 10, median log 2 of that
    items = items_of(x[:, None], skewed)
    for kind, factor in ((AbsoluteError, math.log(2.0)), (SquaredError, 1.0)):
        network = learned(numbers(hidden=(4,)), items, kind, tmp_path / kind.__name__, epochs=12)
        with torch.no_grad():
            found = network(torch.tensor([[0.0], [1.0]]))["value"].ravel().tolist()
        assert found == pytest.approx([10.0 * factor, 40.0 * factor], rel=0.12), kind


def test_a_conformal_margin_is_the_quantile_that_promises_its_coverage() -> None:
    residuals = np.arange(1.0, 20.0, dtype=np.float32)[:, None]  # 19: the fewest that 95 in 100 can be told from
    assert conformal.margins(np.zeros_like(residuals), residuals) == [19.0]
    assert conformal.margins(np.zeros_like(residuals[:18]), residuals[:18]) is None
    more = np.arange(1.0, 100.0, dtype=np.float32)[:, None]
    assert conformal.margins(np.zeros_like(more), -more) == [95.0]
    # ⌈(n + 1) · 0.95⌉ of n: over many draws, at least 95 in 100 new residuals lie within, and not many more.
    random = np.random.default_rng(0)
    inside = []
    for _ in range(2000):
        drawn = random.normal(size=(41, 1)).astype(np.float32)
        margins = conformal.margins(np.zeros((40, 1), np.float32), drawn[:40])
        assert margins is not None
        inside.append(abs(float(drawn[40, 0])) <= margins[0])
    assert 0.945 <= np.mean(inside) <= 0.985
