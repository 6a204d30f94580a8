"""Lanes for batches of few sizes, each with a session of its own; a batch is filled up to the next size.

A convolution chooses its kernel for the size of its input, and forgets it when another size comes: ONNX Runtime then
plans anew for a tenth of a second and more, and a CUDA graph that was recorded with the old kernel is broken. In a
session that sees one size only this is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from server.runtime.device_lane import Lane


def sizes_up_to(most: int) -> list[int]:
    """Powers of two, and `most`."""
    return [*(2**power for power in range((most - 1).bit_length())), most]


class SizedLanes:
    """As `Lane`. For one thread at a time."""

    def __init__(self, lanes: Mapping[int, Lane], *, captured: bool) -> None:
        """lanes: by their size. captured: they capture CUDA graphs, which ONNX Runtime keeps for the thread that has
        recorded them: there is one for all that runs here."""
        self.lanes = dict(sorted(lanes.items()))
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="captured") if captured else None
        self.provider = next(iter(lanes.values())).provider

    def run(self, inputs: Mapping[str, Sequence[np.ndarray]], outputs: Sequence[str]) -> list[np.ndarray]:
        rows = sum(len(part) for part in next(iter(inputs.values())))
        size = next((size for size in self.lanes if size >= rows), max(self.lanes))
        return self._here(lambda: self.lanes[size].run(inputs, outputs))

    def warm_up(self, sample: Callable[[int], Mapping[str, np.ndarray]], outputs: Sequence[str]) -> None:
        for lane in self.lanes.values():
            self._here(lambda lane=lane: lane.warm_up(sample, outputs))  # type: ignore[misc]

    def _here(self, work: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
        return work() if self.thread is None else self.thread.submit(work).result()
