"""Series of numbers to padded batches; standardized in the graph, with the training data's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from export.processing.inputs import BadInput, SeriesInput


def series(values: Sequence[Any] | np.ndarray | bytes, spec: SeriesInput) -> np.ndarray:
    """A series to float32 [length, channels].

    values: a list of steps, each a list of one number a channel (or, with one channel, a number); or all numbers step
    by step as little-endian float32 bytes. Raises BadInput naming the step that is wrong, and for a series longer than
    max_length: a part of it would be another series.
    """
    if isinstance(values, bytes):
        step = 4 * spec.channels
        if len(values) % step:
            raise BadInput(
                f"a series in binary is float32, {step} bytes a step of {_channels(spec)}; {len(values)} bytes are no "
                "whole number of steps"
            )
        array = np.frombuffer(values, dtype="<f4").reshape(-1, spec.channels)
    else:
        array = _array(values, spec)
    if not len(array):
        raise BadInput("the series is empty")
    if len(array) > spec.max_length:
        raise BadInput(f"the series has {len(array):,} steps; this model reads at most {spec.max_length:,}")
    finite = np.isfinite(array)
    if not finite.all():
        step, channel = (int(place) for place in np.argwhere(~finite)[0])
        where = f"step {step}" + (f", channel {channel}" if spec.channels > 1 else "")
        raise BadInput(f"{where} of the series is {array[step, channel]}; every number must be finite in float32")
    return array


def pad_series(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`series` float32 [rows, length, channels], 0 behind the end of each, and `attention_mask` int64 [rows, length]:
    length is that of the longest."""
    lengths = np.array([len(row) for row in rows])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    padded = np.zeros((*mask.shape, rows[0].shape[1]), np.float32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, mask


def _array(values: Sequence[Any] | np.ndarray, spec: SeriesInput) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such later
            array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        for step, numbers in enumerate(values):
            found = len(numbers) if isinstance(numbers, list) else 1
            if found != spec.channels:
                raise BadInput(f"step {step} of the series has {found} numbers; {_channels(spec)} are taken") from error
        raise BadInput(f"a series is a list of steps of {_channels(spec)}: {error}") from error
    if array.ndim == 1 and spec.channels == 1:
        return array[:, None]
    if array.size and (array.ndim != 2 or array.shape[1] != spec.channels):
        raise BadInput(f"the series has shape {list(array.shape)}; this model takes steps of {_channels(spec)}")
    return array


def _channels(spec: SeriesInput) -> str:
    return "1 number" if spec.channels == 1 else f"{spec.channels} numbers"
