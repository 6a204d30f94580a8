"""Latent vectors, which a generator makes images from: drawn, taken as they are, or on the way from one to another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from export.processing.inputs import BadInput

# Below this angle, or as near to its opposite, the way between two vectors is a straight line.
SMALLEST_SINE = 1e-6


def drawn(seed: int, count: int, size: int) -> np.ndarray:
    """float32 [count, size] from a standard normal distribution. The first ones do not depend on how many follow."""
    return np.random.default_rng(seed).standard_normal((count, size), dtype=np.float32)


def given(values: Sequence[float], size: int, where: str) -> np.ndarray:
    """Numbers of a client to float32 [size]. Raises BadInput on a wrong count or value."""
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such below
        array = np.asarray(values, np.float32)
    if array.shape != (size,):
        raise BadInput(f"{where} has {len(values)} numbers; this model takes {size}")
    if not np.isfinite(array).all():
        raise BadInput(f"{where}: every number must be finite in float32")
    return array


def between(start: np.ndarray, end: np.ndarray, steps: int) -> np.ndarray:
    """float32 [steps, size]: the way from `start` to `end`, both of them on it, along a great circle (White 2016).

    On a straight line the vectors would become shorter than any that the generator was trained on.
    """
    shares = np.linspace(0.0, 1.0, steps)[:, None]
    lengths = np.linalg.norm(start.astype(np.float64)) * np.linalg.norm(end.astype(np.float64))
    angle = np.arccos(np.clip(np.dot(start.astype(np.float64), end) / max(lengths, 1e-30), -1.0, 1.0))
    if np.sin(angle) < SMALLEST_SINE:
        way = (1.0 - shares) * start + shares * end
    else:
        way = (np.sin((1.0 - shares) * angle) * start + np.sin(shares * angle) * end) / np.sin(angle)
    found: np.ndarray = way.astype(np.float32)
    return found
