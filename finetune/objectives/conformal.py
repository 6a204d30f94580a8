"""Intervals around numbers from what a network misses held-out items by: split conformal prediction (Papadopoulos et
al. 2002; Lei et al. 2018, "Distribution-Free Predictive Inference for Regression")."""

from __future__ import annotations

import math

import numpy as np

COVERAGE = 0.95


def margins(values: np.ndarray, targets: np.ndarray, coverage: float = COVERAGE) -> list[float] | None:
    """Of each target the margin q with which value ± q holds the truth of a new item with probability `coverage` at
    least: of n residuals |truth - value| the ⌈(n + 1) · coverage⌉-th smallest. None with fewer items than that.

    values, targets: float32 [items, targets] of items that the network did not learn from; a truth may be NaN. What is
    promised holds for items that are drawn as these were. They have chosen the step whose weights are kept, and so are
    missed by a little less than others are.
    """
    found = []
    for value, target in zip(values.T, targets.T, strict=True):
        residuals = np.sort(np.abs(target - value)[~np.isnan(target)])
        place = math.ceil((len(residuals) + 1) * coverage)
        if place > len(residuals):
            return None
        found.append(float(residuals[place - 1]))
    return found
