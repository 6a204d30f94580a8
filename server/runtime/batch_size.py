"""How many rows are worth a batch on a CPU.

Where a row alone fills the core's vector units (a convolution of many pixels), rows that run together take as long as
one after the other, and the first of them waits for the last. Where it does not (matrices, that are read once for all
rows), a batch takes less time for each row, up to what the caches hold.
"""

from __future__ import annotations

from collections.abc import Callable

from server.runtime.sized_lanes import sizes_up_to

# A larger batch is worth it where a row takes this share of its time less.
LEAST_GAIN = 0.04
# Sizes without a gain, one after the other, before no larger one is tried.
PATIENCE = 2


def worthwhile(seconds: Callable[[int], float], most: int) -> int:
    """The smallest batch, of powers of two up to `most`, in which a row takes about as little time as in any. seconds:
    that a batch of so many rows takes."""
    best, chosen, in_vain = float("inf"), 1, 0
    for rows in sizes_up_to(most):
        each = seconds(rows) / rows
        if each < (1.0 - LEAST_GAIN) * best:
            best, chosen, in_vain = each, rows, 0
            continue
        in_vain += 1
        if in_vain == PATIENCE:
            break
    return chosen
