"""The soak: what it calls wrong, and a short one of a real server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from benchmarks.generation.contenders import listening
from benchmarks.soak import Sample, Soak, server_of, soak
from export.bundle import versions
from tests.server.bundles import publish_images, publish_texts, publish_vectors

MIB = 2**20


def run(memory: list[float], files: list[int] | None = None) -> Soak:
    """A sample a second, in MiB."""
    made = Soak(0, 0, Path(), seconds=float(len(memory)), settled=10.0, swaps=1)
    made.samples = [Sample(float(i), int(size * MIB), (files or [20] * 100)[i], 9) for i, size in enumerate(memory)]
    return made


def test_memory_counts_from_when_it_has_settled() -> None:
    rising = [100.0 + 5 * min(i, 10) for i in range(100)]
    assert run(rising).verdict() == []
    # A moment of more, as during a swap, is no growth.
    assert run([*rising[:50], 300.0, *rising[51:]]).verdict() == []
    (problem,) = run([size + i / 10 for i, size in enumerate(rising)]).verdict()
    assert "memory grew by 5." in problem


def test_files_left_open_and_wrong_answers_are_said() -> None:
    flat = [100.0] * 100
    (problem,) = run(flat, [20 + i // 5 for i in range(100)]).verdict()
    assert problem == "38 files are open, and 22 were"
    wrong = run(flat)
    wrong.problems["vector: answered with 500"] += 3
    wrong.swaps = 0
    assert wrong.verdict() == ["3 times: vector: answered with 500", "no model was swapped"]


@pytest.mark.slow
def test_a_mixed_load_with_hot_swaps_gets_right_answers_from_a_server_that_stays_as_it_is(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish_vectors(repository)
    publish_images(repository)
    publish_texts(repository)
    flags = ["--home", str(tmp_path), "--repository", str(repository), "--no-worker", "--poll-seconds", "0.2"]
    said: list[str] = []
    with listening([sys.executable, "-m", "server", *flags], "/health/ready") as port:
        # So short a time tells no leak of 2 %.
        made = Soak(port, server_of(port), repository, seconds=12, settled=4, swapped=1.0, most_growth=0.25)
        asyncio.run(soak(made, said.append))
    assert made.verdict() == []
    assert made.swaps >= 4
    assert max(versions(repository, "points")) > 1
    assert len(said) == 1
    assert min(made.asked.values()) > 0
    assert sum(made.asked.values()) > 500
