"""Series in a column of a table: lists of numbers, or of steps that are lists of one number a channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finetune.data.problems import BadFile

MOST_NUMBERS = 1_000_000
# The largest float32, roughly.
LARGEST = 3.4e38
# Items that tell what a column holds.
LOOKED_AT = 1000


def holds_series(values: Sequence[Any]) -> bool:
    """Whether a column is one of lists of numbers, or of lists of such; a column of numbers may have the same name."""
    return any(
        isinstance(value, list) and isinstance(value[0], int | float | list) for value in values[:LOOKED_AT] if value
    )


def series_reader(values: Sequence[Any], name: str) -> Callable[[int], np.ndarray]:
    """A function from the number of an item to its series, float64 [length, channels]; it raises BadFile.

    name: of the column that holds the `values`.
    """
    # How many numbers a step has is what most items say: the others are wrong, wherever they stand.
    usual = Counter(found for value in values[:LOOKED_AT] if (found := _channels(value)))
    channels = usual.most_common(1)[0][0] if usual else 1

    def read(i: int) -> np.ndarray:
        if not isinstance(values[i], list):
            raise BadFile(f"column {name!r} holds {type(values[i]).__name__}, not a list of numbers")
        if not values[i]:
            raise BadFile("the series is empty")
        try:
            array = np.asarray(values[i])
        except ValueError:  # steps of different size
            array = np.empty(0, object)
        if array.dtype.kind not in "iuf" or array.ndim > 2:
            raise BadFile(_wrong_step(values[i], channels))
        array = array.reshape(len(array), -1).astype(np.float64)
        if array.shape[1] != channels:
            raise BadFile(f"its steps have {array.shape[1]} numbers; those of the other series have {channels}")
        if array.size > MOST_NUMBERS:
            raise BadFile(f"the series has {array.size:,} numbers; at most {MOST_NUMBERS:,} are taken")
        wrong = ~(np.abs(array) <= LARGEST)
        if wrong.any():
            step, channel = np.argwhere(wrong)[0]
            raise BadFile(f"step {step} holds {array[step, channel]}, not a finite number")
        return array

    return read


def _channels(value: Any) -> int:
    """Numbers in the first step of a series, 0 for what is none."""
    if not isinstance(value, list) or not value:
        return 0
    return len(value[0]) if isinstance(value[0], list) else 1


def _wrong_step(steps: list[Any], channels: int) -> str:
    for i, step in enumerate(steps):
        numbers = step if isinstance(step, list) else [step]
        if len(numbers) != channels:
            return f"step {i} has {len(numbers)} numbers, others have {channels}"
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                return f"step {i} holds {repr(number)[:80]}, not a number"
    return "a series is a list of numbers, or a list of steps that are lists of numbers"
