"""Rows and arrays come out of shared memory as they went in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from server.frontends.blocks import Layout, arrays_size, read_arrays, write_arrays

random = np.random.default_rng(0)


def roundtrip(layout: Layout, blocks: list[Any]) -> Any:
    memory = memoryview(bytearray(layout.size(blocks)))
    layout.write(blocks, memory)
    return layout.read(sum(map(len, blocks)), memory)


@pytest.mark.parametrize("rows", [[1], [3], [1, 4, 2]])
@pytest.mark.parametrize(("dtype", "shape"), [(np.float32, (5,)), (np.uint8, (4, 6, 3))])
def test_arrays_of_several_requests_are_one_behind_the_other(rows: list[int], dtype: Any, shape: tuple[int, ...]):
    blocks = [(100 * random.random((count, *shape))).astype(dtype) for count in rows]
    found = roundtrip(Layout(np.dtype(dtype), shape, ragged=False), blocks)
    np.testing.assert_array_equal(found, np.concatenate(blocks))


def test_texts_keep_their_lengths():
    blocks = [[[1, 2, 3]], [[4], [5, 6]], [[7] * 100]]
    found = roundtrip(Layout(np.dtype(np.int32), (), ragged=True), blocks)
    assert [row.tolist() for row in found] == [[1, 2, 3], [4], [5, 6], [7] * 100]


def test_series_keep_their_lengths():
    blocks = [[random.random((steps, 2), dtype=np.float32) for steps in lengths] for lengths in ([3, 1], [7])]
    found = roundtrip(Layout(np.dtype(np.float32), (2,), ragged=True), blocks)
    for one, other in zip(found, [row for block in blocks for row in block], strict=True):
        np.testing.assert_array_equal(one, other)


def test_answers_of_any_shape_and_type():
    arrays = [
        random.random((3, 5), dtype=np.float32),
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4)[:, ::2],
        np.array([1.5, 2.5], np.float16),
        np.arange(4),
        np.zeros((0, 7), np.float32),
    ]
    memory = memoryview(bytearray(arrays_size(arrays)))
    write_arrays(arrays, memory)
    for one, other in zip(read_arrays(memory), arrays, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
