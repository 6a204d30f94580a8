"""How many rows are worth a batch on a CPU.

Where a row alone fills the core's vector units (a convolution of many pixels), rows that run together take as long as
one after the other, and the first of them waits for the last. Where it does not (matrices, that are read once for all
rows), a batch takes less time for each row, up to what the caches hold. These are differences of a few in 100, on
machines that do other things meanwhile: every size is timed several times, in turns, and its shortest time counts.
"""

from __future__ import annotations

from collections.abc import Callable

from server.runtime.sized_lanes import sizes_up_to

# What a row may take longer than in the best batch, so that a smaller one will do.
NEARLY = 0.01
# Sizes in which a row takes no less time than in a smaller one, one after the other, before no larger one is tried.
PATIENCE = 2
ROUNDS = 4
# A run that takes longer keeps others waiting, and a model from being ready.
LONGEST_SECONDS = 0.25


def worthwhile(seconds: Callable[[int], float], most: int) -> int:
    """The smallest batch, of powers of two up to `most`, in which a row takes about as little time as in any. seconds:
    that a batch of so many rows takes, measured anew each time."""
    each: dict[int, float] = {}
    for _ in range(ROUNDS):
        best, in_vain = float("inf"), 0
        for rows in sizes_up_to(most):
            if rows > 1 and rows * best > LONGEST_SECONDS:
                break
            each[rows] = min(seconds(rows) / rows, each.get(rows, float("inf")))
            in_vain = in_vain + 1 if each[rows] > (1.0 - NEARLY) * best else 0
            best = min(best, each[rows])
            if in_vain == PATIENCE:
                break
    return min(rows for rows, took in each.items() if took * (1.0 - NEARLY) <= min(each.values()))
