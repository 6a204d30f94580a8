"""Series of numbers to what enters a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from export.processing.inputs import BadInput, SeriesInput
from export.processing.series import pad_series, series

ONE = SeriesInput(channels=1, max_length=4)
TWO = SeriesInput(channels=2, max_length=4)


def test_one_series_may_be_written_in_several_ways() -> None:
    expected = np.array([[1.0], [2.5], [-3.0]], np.float32)
    for values in ([1, 2.5, -3], [[1], [2.5], [-3.0]], expected.astype("<f4").tobytes(), expected.astype(float)):
        found = series(values, ONE)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.float32
    steps = [[1, 2], [3, 4], [5, 6]]
    np.testing.assert_array_equal(series(np.array(steps, "<f4").tobytes(), TWO), series(steps, TWO))


@pytest.mark.parametrize(
    ("values", "spec", "words"),
    [
        ([], ONE, "empty"),
        (b"", TWO, "empty"),
        ([1.0] * 5, ONE, "5 steps; this model reads at most 4"),
        (b"\0" * 40, TWO, "5 steps; this model reads at most 4"),
        (b"\0" * 12, TWO, "8 bytes a step of 2 numbers; 12 bytes"),
        ([[1, 2], [3]], TWO, "step 1 of the series has 1 numbers; 2 numbers are taken"),
        ([1, 2], TWO, r"shape \[2\]; this model takes steps of 2 numbers"),
        ([[1, 2], [3, 4]], ONE, r"shape \[2, 2\]; this model takes steps of 1 number"),
        ([[1, 2], [3, 1e39]], TWO, "step 1, channel 1 of the series is inf"),
        (np.array([0, np.nan], "<f4").tobytes(), ONE, "step 1 of the series is nan"),
        ([1, "x"], ONE, "a list of steps of 1 number"),
    ],
)
def test_what_is_no_series_says_so(values: Any, spec: SeriesInput, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        series(values, spec)


def test_a_batch_is_padded_behind_its_rows() -> None:
    padded, mask = pad_series([series([[1, 2]], TWO), series([[3, 4], [5, 6], [7, 8]], TWO)])
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert padded[0].tolist() == [[1, 2], [0, 0], [0, 0]]
    assert (padded.shape, padded.dtype, mask.dtype) == ((2, 3, 2), np.float32, np.int64)
