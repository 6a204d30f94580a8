"""Which items make which batch."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.batches import evaluation_order, steps_in_epoch, training_order

LENGTHS = np.random.default_rng(0).integers(4, 128, 1_000)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("step_items", [1, 32, 333, 1_000, 5_000])
def test_an_epoch_sees_every_item_once_in_batches_of_nearly_equal_size(
    lengths: np.ndarray | None, step_items: int
) -> None:
    batches = training_order(1_000, step_items, seed=1, epoch=0, lengths=lengths)
    assert len(batches) == steps_in_epoch(1_000, step_items)
    assert sorted(np.concatenate(batches)) == list(range(1_000))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= step_items
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_the_order_is_a_function_of_seed_and_epoch(lengths: np.ndarray | None) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(training_order(1_000, 32, seed, epoch, lengths)).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(*pair)) for pair in [(1, 2), (1, 3), (2, 2), (2, 3)]}) == 4


def test_texts_of_a_batch_have_like_lengths() -> None:
    def padding(batches: list[np.ndarray]) -> float:
        padded = sum(LENGTHS[batch].max() * len(batch) for batch in batches)
        return float(padded / LENGTHS.sum() - 1.0)

    assert padding(training_order(1_000, 16, 0, 0, LENGTHS)) < 0.05
    assert padding(training_order(1_000, 16, 0, 0)) > 0.5
    assert padding(evaluation_order(1_000, 16, LENGTHS)) < 0.05


def test_batches_of_an_epoch_do_not_grow_in_length() -> None:
    longest = [int(LENGTHS[batch].max()) for batch in training_order(1_000, 16, 0, 0, LENGTHS)]
    assert longest != sorted(longest)


def test_evaluation_sees_every_item_once() -> None:
    for lengths in (None, LENGTHS):
        assert sorted(np.concatenate(evaluation_order(1_000, 64, lengths))) == list(range(1_000))
