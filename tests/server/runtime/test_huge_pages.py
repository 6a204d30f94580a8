"""What is in memory stays what it was, in fewer pages."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from server.runtime.huge_pages import SIZE, blocks, fold, huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its pages")


def in_huge_pages() -> int:
    """Bytes of this process."""
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_what_is_allocated_inside_keeps_its_numbers() -> None:
    before, already = blocks(), in_huge_pages()
    with huge_pages():
        memory = mmap.mmap(-1, 9 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        numbers = np.frombuffer(memory, np.int32)
        numbers[:] = np.arange(len(numbers))
    inside = blocks() - before
    assert len(inside) >= 8
    assert np.array_equal(numbers, np.arange(len(numbers)))
    folded = fold(inside)
    assert np.array_equal(numbers, np.arange(len(numbers)))
    if folded:
        assert in_huge_pages() - already >= 8 * SIZE


def test_memory_that_is_gone_is_no_error() -> None:
    with huge_pages():
        memory = mmap.mmap(-1, 5 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        there = blocks()
        memory.close()
    gone = there - blocks()
    assert len(gone) >= 4
    assert fold(gone) == 0
