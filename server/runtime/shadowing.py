"""Asking another version what a model was asked, and comparing: nobody waits for it and nobody sees its answer.

A request is drawn when it comes and its rows are kept; it is asked of the shadow once its answer is known, behind all
requests that wait there. A shadow that is slower than what it follows is asked less: only so many requests are open.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import numpy as np

from export.bundle import Manifest
from export.processing.answers import label_set
from server.runtime.answers import Unsure
from server.runtime.batcher import PRIORITIES, Block, Ticket, Wanted
from server.runtime.model import Model

MOST_OPEN = 64
# Numbers are the same where they differ by no more than this share of the largest, or of 1 where none is larger.
TOLERANCE = 1e-3
# A label is in a set from this probability on.
THRESHOLD = 0.5


class Shadowing:
    """`share` of the requests that it is called with are asked of the model that `find` gives."""

    def __init__(
        self,
        share: float,
        seconds: float,
        find: Callable[[], Awaitable[Model]],
        count: Callable[[str], None],
    ) -> None:
        """seconds: that the shadow may take. count: is told "same", "different" or "failed" of every such request."""
        self.share, self.seconds, self.find, self.count = share, seconds, find, count
        self.tasks: set[asyncio.Task[None]] = set()
        self.open = 0

    def of(self, model: Model) -> Callable[[Ticket, Block, Wanted], None]:
        """What `model` is to tell of its requests."""
        return partial(self._drawn, model.manifest)

    def _drawn(self, manifest: Manifest, ticket: Ticket, block: Block, wanted: Wanted) -> None:
        if random.random() >= self.share or self.open >= MOST_OPEN:
            return
        self.open += 1
        # Rows may lie in memory that is another request's once this one is answered.
        kept = np.array(block) if isinstance(block, np.ndarray) else [_copied(row) for row in block]
        ticket.future.add_done_callback(partial(self._answered, manifest, kept, wanted))

    def _answered(self, manifest: Manifest, block: Block, wanted: Wanted, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None:
            self.open -= 1
            return
        task = asyncio.get_running_loop().create_task(self._ask(manifest, block, wanted, future.result()))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _ask(self, manifest: Manifest, block: Block, wanted: Wanted, expected: Any) -> None:
        outcome = "failed"
        try:
            model = await self.find()
            model.requests += 1
            try:
                deadline = time.perf_counter() + self.seconds
                ticket = model.submit(block, wanted, deadline=deadline, priority=PRIORITIES[0])
                found = await ticket.future
            finally:
                model.requests -= 1
            outcome = "same" if same(wanted, expected, manifest, found, model.manifest) else "different"
        except Exception:  # of whatever kind: a shadow harms nobody, and it is counted
            outcome = "failed"
        finally:
            self.open -= 1
            self.count(outcome)


def same(wanted: Wanted, one: Any, manifest: Manifest, other: Any, others: Manifest) -> bool:
    """Whether two answers agree: classes by the best label, sets of labels by what is in them, numbers within
    TOLERANCE, everything else exactly."""
    if wanted == "classify":
        return [_labels(row, manifest) for row in one] == [_labels(row, others) for row in other]
    return _alike(one, other)


def _labels(row: Any, manifest: Manifest) -> list[str]:
    probabilities = np.asarray(row.answer if isinstance(row, Unsure) else row)
    if manifest.task == "multi_label":
        return label_set(probabilities, manifest.labels, THRESHOLD)
    return [manifest.labels[int(probabilities.argmax())]]


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, np.ndarray | np.number | float) and isinstance(other, np.ndarray | np.number | float):
        first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if first.shape != second.shape:
            return False
        largest = float(np.abs(first).max(initial=1.0))
        return bool(np.all(np.abs(first - second) <= TOLERANCE * largest))
    return bool(one == other)


def _copied(row: Any) -> Any:
    return np.array(row) if isinstance(row, np.ndarray) else row
