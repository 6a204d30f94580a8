"""Which items make which batch: a function of seed and epoch, so that a resumed run goes on in the same order."""

from __future__ import annotations

import math

import numpy as np

# Batches among which texts are sorted by length: enough to save nearly all padding, few enough to stay random.
WINDOW = 50


def steps_in_epoch(items: int, step_items: int) -> int:
    return math.ceil(items / step_items)


def training_order(
    items: int, step_items: int, seed: int, epoch: int, lengths: np.ndarray | None = None
) -> list[np.ndarray]:
    """The items of each step of an epoch: int64 positions, at most `step_items` each, of nearly equal number.

    Equal, because the odd few at the end of an epoch would count as much as a full batch, and because batch norm
    cannot train on one item. With `lengths` (int [items], in tokens) those of a batch are alike, so that little is
    padded: items are shuffled, sorted within windows of 50 batches, cut, and the batches are shuffled.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(items)
    if lengths is not None:
        window = WINDOW * step_items
        pieces = [order[start : start + window] for start in range(0, items, window)]
        order = np.concatenate([piece[np.argsort(lengths[piece], kind="stable")] for piece in pieces])
    batches = np.array_split(order, steps_in_epoch(items, step_items))
    if lengths is not None:
        batches = [batches[i] for i in random.permutation(len(batches))]
    return batches


def evaluation_order(items: int, size: int, lengths: np.ndarray | None = None) -> list[np.ndarray]:
    """Every item once, in batches of at most `size`: in order, or from the shortest to the longest."""
    order = np.arange(items) if lengths is None else np.argsort(lengths, kind="stable")
    return np.array_split(order, math.ceil(items / size))
