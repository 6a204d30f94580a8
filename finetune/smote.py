"""SMOTE: Chawla, Bowyer, Hall and Kegelmeyer 2002 ("SMOTE: synthetic minority over-sampling technique")."""

from __future__ import annotations

import numpy as np

from finetune.preprocess import Items

# Distances of so many items to all others are held at once.
AT_ONCE = 512


def oversample(items: Items, neighbours: int, seed: int) -> Items:
    """Vectors with every class as often as the most frequent one: the originals, then synthetic items.

    A synthetic item lies at a random place between an original and one of its nearest neighbours of the same class;
    near is meant in deviations of each feature. A class of one item is repeated.
    """
    vectors = items.batch(np.arange(len(items)))["vector"]
    counts = np.bincount(items.targets)
    random = np.random.default_rng(seed)
    deviation = vectors.std(axis=0)
    scaled = vectors / np.where(deviation > 0, deviation, 1.0)
    made, targets = [vectors], [items.targets]
    for label, count in enumerate(counts):
        missing = counts.max() - count
        if count == 0 or missing == 0:
            continue
        own = np.flatnonzero(items.targets == label)
        near = nearest(scaled[own], min(neighbours, count - 1))
        one = random.integers(count, size=missing)
        other = near[one, random.integers(near.shape[1], size=missing)] if near.shape[1] else one
        place = random.random((missing, 1), dtype=np.float32)
        made.append(vectors[own[one]] + place * (vectors[own[other]] - vectors[own[one]]))
        targets.append(np.full(missing, label, np.int64))
    everything = np.concatenate(made)
    return Items(np.concatenate(targets), None, np.arange(len(everything)), lambda rows: {"vector": everything[rows]})


def nearest(vectors: np.ndarray, neighbours: int) -> np.ndarray:
    """int64 [items, neighbours]: the nearest others of each of float32 [items, features], nearest first."""
    found = np.empty((len(vectors), neighbours), np.int64)
    squares = np.square(vectors).sum(axis=1)
    for start in range(0, len(vectors), AT_ONCE):
        rows = np.arange(start, min(start + AT_ONCE, len(vectors)))
        distances = squares[rows, None] - 2.0 * vectors[rows] @ vectors.T + squares
        distances[np.arange(len(rows)), rows] = np.inf  # not itself
        found[rows] = np.argsort(distances, axis=1, kind="stable")[:, :neighbours]
    return found
