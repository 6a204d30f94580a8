"""Pieces of prompts are as large as the time allows."""

from __future__ import annotations

import numpy as np
import pytest

from server.runtime.pace import LONGEST_SECONDS, PATIENCE, SIZES, STEPS, Pace


@pytest.mark.parametrize("a_token", [1e-5, 2e-4, 2e-3, 1e-2])
@pytest.mark.parametrize("fixed", [0.0, 0.02])
def test_a_piece_keeps_within_the_time_and_is_no_smaller_than_it_must_be(a_token: float, fixed: float) -> None:
    random, pace = np.random.default_rng(0), Pace()
    step = fixed + 8 * a_token

    def seconds(tokens: int) -> float:
        return max(fixed, a_token * tokens)

    for writing, allowed in ((False, LONGEST_SECONDS), (True, STEPS * step), (False, LONGEST_SECONDS)):
        sizes = []
        for _ in range(4 * PATIENCE):
            pace.stepped(step * random.uniform(0.95, 1.05))
            sizes.append(pace.chunk(writing=writing))
            pace.read(sizes[-1], seconds(sizes[-1]) * random.uniform(0.95, 1.05))
        usual = int(np.median(sizes))
        assert usual == SIZES[0] or seconds(usual) <= 1.1 * allowed
        assert usual == SIZES[-1] or seconds(2 * usual) > 0.9 * allowed
        # A larger one is tried now and then.
        assert sum(size > usual and seconds(size) > 1.1 * allowed for size in sizes) <= 20


def test_a_size_that_was_slow_once_gets_another_chance() -> None:
    pace = Pace()

    def read() -> int:
        size = pace.chunk(writing=True)
        pace.stepped(0.1)
        pace.read(size, 1e-3 * size)
        return size

    usual = [read() for _ in range(20)][-1]
    pace.read(usual, 5.0)
    assert read() < usual
    assert [read() for _ in range(2 * PATIENCE)][-1] == usual


def settled(step: float, fixed: float, a_token: float, **asked: int) -> int:
    """The size that readings of fixed + a_token · tokens come to."""
    pace = Pace()
    for _ in range(4 * PATIENCE):
        pace.stepped(step)
        size = pace.chunk(**asked)
        pace.read(size, fixed + a_token * size)
    return size


def test_a_piece_is_never_so_small_that_most_of_it_is_the_weights() -> None:
    # Two steps have no time even for 16 tokens, which would cost three times as much as they must.
    size = settled(0.015, 0.03, 1e-3, writing=1)
    assert (0.03 + 1e-3 * size) / size < 0.6 * (0.03 + 1e-3 * SIZES[0]) / SIZES[0]
    assert 0.03 + 1e-3 * size <= LONGEST_SECONDS


def test_many_that_wait_for_their_first_token_may_keep_a_few_from_their_next() -> None:
    few, many = (settled(0.02, 0.0, 1e-3, writing=2, reading=reading) for reading in (2, 16))
    assert few == 32  # two steps
    assert many == 256  # sixteen steps
    assert settled(0.02, 0.0, 1e-3, writing=1, reading=1000) <= 1e3 * LONGEST_SECONDS
