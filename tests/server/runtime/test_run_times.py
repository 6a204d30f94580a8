"""What runs are expected to take, and how large a batch may be."""

from __future__ import annotations

import math

import pytest

from server.runtime.run_times import HOPE, RunTimes
from server.runtime.throughput import Throughput


def test_before_the_first_run_nothing_is_refused() -> None:
    assert RunTimes().expected(64) == 0.0
    assert RunTimes().largest(0.001, 64) == 64
    assert Throughput().rate() == math.inf


def test_the_largest_batch_is_the_one_that_keeps_within_the_time() -> None:
    times = RunTimes()
    for rows in (1, 2, 4, 8, 16, 32):
        times.add(rows, 0.010 * rows)
    assert [times.largest(seconds, 32) for seconds in (0.005, 0.010, 0.05, 0.17, 1.0)] == [1, 1, 4, 16, 32]
    assert times.largest(0.2, 20) == 16


def test_a_size_that_was_not_tried_is_hoped_to_gain() -> None:
    times = RunTimes()
    times.add(1, 0.010)
    assert times.expected(4) == pytest.approx(0.010 * HOPE**2)
    assert times.largest(0.014, 64) == 2


def test_bad_times_are_forgotten_by_what_is_measured_at_other_sizes() -> None:
    times = RunTimes()
    for rows in (1, 8, 64):
        times.add(rows, 10.0)
    times.add(8, 0.0)
    for _ in range(60):
        times.add(8, 0.008)
    assert times.expected(1) <= times.expected(8) == pytest.approx(0.008, rel=0.01)
    assert times.expected(64) <= 8 * times.expected(8) * 1.01


def test_throughput_is_of_late() -> None:
    found = Throughput()
    found.add(1000.0, 10.0)
    assert found.rate() == pytest.approx(100.0)
    for _ in range(20):
        found.add(10.0, 1.0)
    assert found.rate() == pytest.approx(10.0, rel=0.01)
