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
