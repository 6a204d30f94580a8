"""Rows in shared memory: how the block of a request lies there, and what a graph answers to it."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from export.bundle import Manifest
from export.processing.inputs import ImageInput, LatentInput, SeriesInput, TextInput, VectorInput
from server.runtime.batcher import Block

ALIGNMENT = 64
LENGTH = np.dtype("<u4")


class Layout(NamedTuple):
    """Of the rows that a graph takes. shape: of a row; where rows are ragged, of one step of it: they lie one behind
    the other then, their lengths before them."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    ragged: bool

    def size(self, blocks: Sequence[Block]) -> int:
        """Bytes of the rows of all blocks."""
        if not self.ragged:
            return sum(map(len, blocks)) * math.prod(self.shape) * self.dtype.itemsize
        rows = list(chain.from_iterable(blocks))
        return aligned(len(rows) * LENGTH.itemsize) + sum(map(len, rows)) * math.prod(self.shape) * self.dtype.itemsize

    def write(self, blocks: Sequence[Block], memory: memoryview) -> None:
        """memory: `size` bytes."""
        if not self.ragged:
            np.concatenate(blocks, out=np.frombuffer(memory, self.dtype).reshape(-1, *self.shape))
            return
        rows = list(chain.from_iterable(blocks))
        lengths = np.frombuffer(memory, LENGTH, len(rows))
        lengths[:] = [len(row) for row in rows]
        steps = np.frombuffer(memory, self.dtype, offset=aligned(lengths.nbytes)).reshape(-1, *self.shape)
        if not self.shape:
            steps[:] = list(chain.from_iterable(rows))
        elif rows:
            np.concatenate(rows, out=steps)

    def read(self, rows: int, memory: memoryview) -> Block:
        """Views on the memory: [rows, …], or one array for each of ragged rows."""
        if not self.ragged:
            return np.frombuffer(memory, self.dtype).reshape(rows, *self.shape)
        lengths = np.frombuffer(memory, LENGTH, rows)
        steps = np.frombuffer(memory, self.dtype, offset=aligned(lengths.nbytes)).reshape(-1, *self.shape)
        return np.split(steps, np.cumsum(lengths)[:-1])


def layout(manifest: Manifest) -> Layout:
    """Of what model.onnx takes."""
    match manifest.input:
        case ImageInput(height=height, width=width, channels=channels):
            return Layout(np.dtype(np.uint8), (height, width, channels), ragged=False)
        case VectorInput(features=features):
            return Layout(np.dtype(np.float32), (features,), ragged=False)
        case LatentInput(size=size):
            return latent(size)
        case TextInput():
            return Layout(np.dtype(np.int32), (), ragged=True)
        case SeriesInput(channels=channels):
            return Layout(np.dtype(np.float32), (channels,), ragged=True)


def latent(size: int) -> Layout:
    """Of what a graph that makes images takes."""
    return Layout(np.dtype(np.float32), (size,), ragged=False)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


ARRAY = struct.Struct("<8sQ")  # dtype, and how many axes
AXIS = struct.Struct("<Q")


def arrays_size(arrays: Sequence[np.ndarray]) -> int:
    return sum(ARRAY.size + AXIS.size * array.ndim + -(-array.nbytes // 8) * 8 for array in arrays)


def write_arrays(arrays: Sequence[np.ndarray], memory: memoryview) -> None:
    """memory: `arrays_size` bytes."""
    place = 0
    for array in arrays:
        ARRAY.pack_into(memory, place, array.dtype.str.encode(), array.ndim)
        place += ARRAY.size
        for axis in array.shape:
            AXIS.pack_into(memory, place, axis)
            place += AXIS.size
        np.frombuffer(memory, array.dtype, array.size, place).reshape(array.shape)[...] = array
        place += -(-array.nbytes // 8) * 8


def read_arrays(memory: memoryview) -> Iterator[np.ndarray]:
    """Copies of the arrays that were written there."""
    place = 0
    while place < len(memory):
        dtype, axes = ARRAY.unpack_from(memory, place)
        place += ARRAY.size
        shape = [AXIS.unpack_from(memory, place + AXIS.size * axis)[0] for axis in range(axes)]
        place += AXIS.size * axes
        array = np.frombuffer(memory, dtype.rstrip(b"\0").decode(), math.prod(shape), place).reshape(shape)
        yield array.copy()
        place += -(-array.nbytes // 8) * 8
