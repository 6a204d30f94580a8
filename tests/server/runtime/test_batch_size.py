"""How many rows are worth a batch, of sessions that take known times."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from server.runtime.batch_size import ROUNDS, worthwhile
from server.runtime.batcher import alike
from server.runtime.deployment import Deployment
from server.runtime.model import load
from server.settings import Settings
from tests.server.bundles import publish_vectors


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        (lambda rows: 0.001 * rows, 1),  # a convolution: as long together as one by one
        (lambda rows: 0.010 + 0.001 * rows, 64),  # what is read once for all of them
        (lambda rows: (0.0078 + 0.0018 / rows + 0.00004 * max(0, rows - 32)) * rows, 16),  # much like MiniLM
        (lambda rows: 0.001 * rows if rows < 32 else 0.0001 * rows, 1),  # beyond two sizes in vain nothing is tried
        (lambda rows: {1: 0.01, 2: 0.02, 4: 0.02}.get(rows, 0.006 * rows), 4),  # one in vain is looked behind
        (lambda rows: 0.100 * rows, 1),
        (lambda rows: 0.100 * rows**0.9, 2),  # four would keep others waiting
    ],
)
def test_no_more_rows_than_gain_something(seconds: Callable[[int], float], rows: int) -> None:
    assert worthwhile(seconds, 64) == rows


@pytest.mark.parametrize("disturbed", range(1, 12))
def test_one_bad_moment_decides_nothing(disturbed: int) -> None:
    calls = itertools.count(1)

    def seconds(rows: int) -> float:
        return (0.0078 + 0.0018 / rows) * rows * (1.5 if next(calls) == disturbed else 1.0)

    assert worthwhile(seconds, 64) == 16


def test_no_batch_is_tried_that_may_not_be() -> None:
    tried: list[int] = []

    def seconds(rows: int) -> float:
        tried.append(rows)
        return 0.01

    assert worthwhile(seconds, 12) == 12
    assert tried == ROUNDS * [1, 2, 4, 8, 12]


def test_long_texts_run_in_smaller_batches_than_short_ones() -> None:
    assert len(alike([8] * 64, 64, 0.1, 256)) == 32
    assert len(alike([128] * 64, 64, 0.1, 256)) == 2
    assert alike([1000, 3, 1000], 64, 0.1, 256) == [0]  # one row is always run
    assert alike([100, 101, 120, 99], 64, 0.25, 256) == [0, 1]


def test_a_model_that_answers_at_once_takes_all_that_the_bundle_allows(tmp_path: Path) -> None:
    manifest = publish_vectors(tmp_path)
    found = load(
        tmp_path / manifest.name / "1", Settings(home=tmp_path, providers=["CPUExecutionProvider"]), Deployment()
    )
    assert found.inline
    assert found.most is None
