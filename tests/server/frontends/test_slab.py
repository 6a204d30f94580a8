"""Parts of shared memory: none overlaps another, and what is given back can be had again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.frontends.slab import LEAST, Slab


def test_all_of_it_can_be_had_in_one_or_in_many_parts():
    slab = Slab(8 * LEAST)
    whole = slab.allocate(8 * LEAST)
    assert whole == 0
    assert slab.allocate(1) is None
    slab.release(whole, 8 * LEAST)
    parts = [slab.allocate(LEAST) for _ in range(8)]
    assert sorted(part for part in parts if part is not None) == [LEAST * i for i in range(8)]
    assert slab.allocate(1) is None
    for part in parts:
        assert part is not None
        slab.release(part, LEAST)
    assert slab.allocate(8 * LEAST) == 0


def test_what_was_given_back_last_is_had_first():
    slab = Slab(64 * LEAST)
    first, second = slab.allocate(100), slab.allocate(100)
    assert first is not None
    assert second is not None
    slab.release(first, 100)
    slab.release(second, 100)
    assert slab.allocate(50) == second


def test_more_than_there_is_cannot_be_had():
    assert Slab(4 * LEAST).allocate(4 * LEAST + 1) is None


def test_a_capacity_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        Slab(3 * LEAST)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9 * LEAST)), max_size=120))
def test_parts_never_overlap(steps: list[tuple[bool, int]]):
    """Steps: (take, bytes), or (give back, which)."""
    capacity = 32 * LEAST
    slab = Slab(capacity)
    held: list[tuple[int, int]] = []
    for take, number in steps:
        if not take and held:
            slab.release(*held.pop(number % len(held)))
        elif take:
            place = slab.allocate(number)
            if place is None:
                continue
            assert place + number <= capacity
            assert all(place + max(number, 1) <= other or other + max(size, 1) <= place for other, size in held)
            held.append((place, number))
    for place, size in held:
        slab.release(place, size)
    assert slab.allocate(capacity) == 0
