"""Numbers that are cut out of a JSON body are those that a plain reading of the body finds, or none."""

from __future__ import annotations

import json
import random

import msgspec
import numpy as np
import pytest

from export.processing.inputs import VectorInput
from export.processing.vectors import vectors
from server import cut_numbers
from server.cut_numbers import cut, one_vector


class Asked(msgspec.Struct):
    model: str
    input: msgspec.Raw
    top_k: int = 5


plain = msgspec.json.Decoder(Asked)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "input": [1, 2.5, -3], "top_k": 2}',
        b'{"input":[1,2.5,-3],"model":"m"}',
        b' {"top_k" : 3 , "input" : [ 1 , 2.5e0 , -3 ] , "model" : "m" } ',
        b'{"model": "m", "input": "text", "input": [1, 2.5, -3]}',
        b'{"model": "m", "more": {"x": [{}]}, "input": [1, 2.5, -3]}',
    ],
)
@pytest.mark.parametrize("with_simdjson", [True, False])
def test_a_vector(body: bytes, with_simdjson: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_simdjson:
        monkeypatch.setattr(cut_numbers, "parser", None)
    parts = cut(body, Asked)
    assert parts is not None
    rest, text = parts
    whole = plain.decode(body)
    assert (rest.model, rest.top_k) == (whole.model, whole.top_k)
    block = one_vector(text, VectorInput(features=3))
    assert block is not None
    assert block.dtype == np.float32
    np.testing.assert_array_equal(block, np.float32([[1, 2.5, -3]]))
    for features in (1, 2, 4):
        assert one_vector(text, VectorInput(features=features)) is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "input": [[1, 2]]}',
        b'{"model": "m", "input": "1, 2"}',
        b'{"model": "m", "input": [1, 2], "input": [3, 4]}',
        b'{"model": "m", "input": [1, 2], "input": "text"}',
        b'{"model": "m", "input": [1, 2], "\\u0069nput": [3, 4]}',
        b'{"model": "m", "more": {"input": [1, 2]}, "input": [3, 4]}',
        b'{"model": "m", "more": {"input": [1, 2]}}',
        b'{"model": "a \\"input\\": [1, 2]", "input": [[3, 4]]}',
        b'{"model": 7, "input": [1, 2]}',
        b'{"model": "m", "input": [1, 2]',
        b'{"model": "m", "input": [1, 2',
        b'{"model": "m", "input": [1, 2]} x',
        b'{"model": "m", "top_k": "x", "input": [1, 2]}',
        b'{"model": "\xff", "input": [1, 2]}',
    ],
)
def test_what_is_no_vector_or_wrong_is_left_to_a_plain_reading(body: bytes) -> None:
    assert cut(body, Asked) is None


@pytest.mark.parametrize("with_simdjson", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        b"[1, null]",
        b'[1, "2"]',
        b"[1, true]",
        b"[1, [2]",
        b"[1, 02]",
        b"[1,]",
        b"[1, 1e39]",
        b"[1, -1e300]",
        b"[1, 1e999]",
    ],
)
def test_what_is_no_number_is_refused(text: bytes, with_simdjson: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_simdjson:
        monkeypatch.setattr(cut_numbers, "parser", None)
    assert one_vector(text, VectorInput(features=2)) is None


def test_numbers_are_read_to_the_last_bit() -> None:
    chance = random.Random(0)
    numbers = [chance.uniform(-1, 1) * 10.0 ** chance.randint(-44, 37) for _ in range(500)]
    numbers += [chance.randint(-(2**63), 2**63) for _ in range(100)]
    spec = VectorInput(features=len(numbers))
    block = one_vector(json.dumps(numbers).encode(), spec)
    assert block is not None
    np.testing.assert_array_equal(block, np.float32([numbers]))
    np.testing.assert_array_equal(block, vectors([numbers], spec))
