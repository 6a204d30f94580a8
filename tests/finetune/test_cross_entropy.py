"""The objective against hand computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from finetune import recipe
from finetune.objectives.cross_entropy import CrossEntropy, build, class_weights

LABELS = ["cat", "dog", "eel"]


def test_label_smoothing_equals_the_hand_computation() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0]])
    p = np.exp([2.0, 1.0, -1.0]) / np.exp([2.0, 1.0, -1.0]).sum()
    q = np.array([0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3])
    found = CrossEntropy(3, label_smoothing=0.1).loss({"logits": logits}, torch.tensor([1]))
    assert float(found) == pytest.approx(-(q * np.log(p)).sum(), rel=1e-6)


def test_balanced_weights_make_every_class_count_alike() -> None:
    targets = np.array([0] * 6 + [1] * 3 + [2])
    weights = class_weights(recipe.CrossEntropy(class_weights="balanced"), LABELS, targets)
    assert weights is not None
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert (weights[torch.from_numpy(targets)]).sum() == pytest.approx(10.0)


def test_balanced_weight_of_a_class_that_training_lacks_is_zero() -> None:
    weights = class_weights(recipe.CrossEntropy(class_weights="balanced"), LABELS, np.array([0, 1]))
    assert weights is not None
    assert weights.tolist() == pytest.approx([2 / 3, 2 / 3, 0.0])


def test_weights_by_label() -> None:
    section = recipe.CrossEntropy(class_weights={"dog": 4.0, "cat": 0.5})
    objective = build(section, LABELS, np.array([0, 1, 2]))
    logits = torch.zeros(3, 3)
    targets = torch.tensor([0, 1, 2])
    assert float(objective.loss({"logits": logits}, targets)) == pytest.approx(5.5 * math.log(3))
    assert objective.weight(targets) == 5.5
    with pytest.raises(ValueError, match="no label 'cow'"):
        build(recipe.CrossEntropy(class_weights={"cow": 1.0}), LABELS, np.array([0]))


def test_sums_over_uneven_pieces_add_up_to_the_mean_over_all() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 3, generator=generator)
    targets = torch.randint(0, 3, (10,), generator=generator)
    weights = torch.tensor([1.0, 2.0, 3.0])
    objective = CrossEntropy(3, 0.1, weights)
    pieces = [(logits[:7], targets[:7]), (logits[7:], targets[7:])]
    total = sum(float(objective.loss({"logits": x}, y)) for x, y in pieces)
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    expected = float((whole * weights[targets]).sum() / weights[targets].sum())
    assert total / objective.weight(targets) == pytest.approx(expected, rel=1e-6)
