"""Tensors of every datatype come as they were sent, in JSON and in binary."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor

from export.processing.inputs import BadInput
from server import tensors

NUMBERS = sorted(tensors.DATATYPES)
SHAPES = array_shapes(max_dims=4, max_side=4)


def of_any_datatype(*without: str) -> st.SearchStrategy[np.ndarray]:
    kinds = st.sampled_from([tensors.DATATYPES[name] for name in NUMBERS if name not in without])
    return kinds.flatmap(lambda kind: arrays(kind, SHAPES))


def finite(*without: str) -> st.SearchStrategy[np.ndarray]:
    return of_any_datatype(*without).filter(lambda array: bool(np.isfinite(array).all()))


@given(array=of_any_datatype(), offset=st.integers(0, 7))
def test_a_binary_tensor_is_a_view_on_what_came(array: np.ndarray, offset: int) -> None:
    received = b"\0" * offset + array.tobytes()
    content = memoryview(received)[offset:]
    name, found = tensors.from_buffer("x", np_to_triton_dtype(array.dtype), array.shape, content)
    assert name == "x"
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    assert not found.flags.owndata
    assert bytes(tensors.to_buffer(found)) == array.tobytes()


@given(array=finite("FP16"), deep=st.booleans())
def test_a_json_tensor_is_what_it_says(array: np.ndarray, deep: bool) -> None:
    data = msgspec.Raw(msgspec.json.encode((array if deep else array.ravel()).tolist()))
    _, found = tensors.from_json("x", np_to_triton_dtype(array.dtype), array.shape, data)
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)
    assert np.array(tensors.to_json("x", found), array.dtype).tobytes() == array.tobytes()


@given(elements=st.lists(st.binary(max_size=20), min_size=1, max_size=6))
def test_bytes_as_triton_s_clients_write_them(elements: list[bytes]) -> None:
    array = np.array(elements, np.object_)
    content = serialize_byte_tensor(array).item()
    _, found = tensors.from_buffer("x", "BYTES", array.shape, content)
    assert found == elements
    assert deserialize_bytes_tensor(bytes(tensors.to_buffer(elements))).tolist() == elements


@given(
    data=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4),
    ),
    shape=st.lists(st.integers(1, 3), max_size=4),
    datatype=st.sampled_from([*NUMBERS, "BYTES"]),
)
def test_whatever_is_sent_is_a_tensor_of_the_shape_or_bad_input(data: Any, shape: list[int], datatype: str) -> None:
    raw = msgspec.Raw(msgspec.json.encode(data))
    try:
        _, found = tensors.from_json("x", datatype, shape, raw)
    except BadInput:
        return
    if isinstance(found, list):
        assert len(found) == np.prod(shape, dtype=int)
    else:
        assert list(found.shape) == shape


@given(content=st.binary(max_size=60), count=st.integers(0, 5))
def test_whatever_is_sent_as_bytes_has_the_count_or_is_bad_input(content: bytes, count: int) -> None:
    try:
        _, found = tensors.from_buffer("x", "BYTES", [count], content)
    except BadInput:
        return
    assert len(found) == count
    assert sum(map(len, found)) + 4 * count == len(content)


def test_fp16_is_binary_only() -> None:
    with pytest.raises(BadInput, match="binary"):
        tensors.from_json("x", "FP16", [1], msgspec.Raw(b"[1.0]"))
    with pytest.raises(BadInput, match="binary"):
        tensors.to_json("x", np.float16([1.0]))


def test_the_best_scores_with_equal_ones_in_their_order() -> None:
    scores = np.float32([[0.5, 2.0, 2.0, -1.0]])
    assert tensors.classes("x", scores, 3, ["a", "b"]) == [b"2.000000:1:b", b"2.000000:2", b"0.500000:0:a"]
    with pytest.raises(BadInput, match="1 or more"):
        tensors.classes("x", scores, 0, [])
