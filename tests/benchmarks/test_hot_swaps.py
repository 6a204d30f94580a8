"""The hot swaps, a few of them."""

from __future__ import annotations

import pytest

from benchmarks.hot_swaps import run


@pytest.mark.slow
def test_no_answer_fails_or_is_of_a_wrong_version() -> None:
    for load in run(swaps=8, connections=4).values():
        assert load.requests
        assert load.failures == load.wrong == 0
