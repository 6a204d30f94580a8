"""Whatever comes, in whatever order: everybody gets the answers of their own rows, and the bounds hold."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.histograms import Distribution
from server.metrics import ROWS, SECONDS
from server.runtime.batcher import Batcher, Block, ClientGone, DeadlinePassed, QueueFull, Ticket, Value, Wanted
from server.runtime.runs import Runs

MOST_ROWS, QUEUE_ROWS, QUEUE_BYTES = 5, 40, 40 * 8 * 3
WANTED: tuple[Wanted, ...] = ("logits", "embedding", ("logits",), ("embedding", "logits"))


@dataclass(frozen=True)
class Asked:
    """pause: turns of the loop before it. fate: what becomes of it: answered, cancelled, its client gone, or late, its
    deadline passed before it came."""

    rows: int
    pause: int
    wanted: Wanted
    priority: int
    fate: str


@dataclass
class Seen:
    """What the session was asked to run, row by row, and the most that has waited."""

    batches: list[list[int]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    def run(self, blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
        rows = np.array([int(np.asarray(row).flat[0]) for block in blocks for row in block])
        self.batches.append(rows.tolist())
        outputs = {"logits": rows * 2, "embedding": rows * 3}
        return {one: outputs[one] if isinstance(one, str) else [outputs[name] for name in one] for one in wanted}

    def refuse(self, reason: str) -> None:
        self.refused[reason] += 1


asked = st.builds(
    Asked,
    rows=st.integers(1, 12),
    pause=st.integers(0, 2),
    wanted=st.sampled_from(WANTED),
    priority=st.sampled_from([0, 0, 0, -1, 2]),
    fate=st.sampled_from(["answered"] * 6 + ["cancelled", "gone", "late"]),
)


def expected(rows: list[int], wanted: Wanted) -> Any:
    outputs = {"logits": [2 * row for row in rows], "embedding": [3 * row for row in rows]}
    return outputs[wanted] if isinstance(wanted, str) else [outputs[name] for name in wanted]


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else [one.tolist() for one in value]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("parallel", [0, 1, 2])
@settings(max_examples=40, deadline=None)
@given(
    story=st.lists(asked, min_size=1, max_size=25),
    preferred=st.sampled_from([(), (2, 4)]),
    delay=st.sampled_from([0.0, 0.0005]),
)
def test_everybody_gets_their_own_and_the_bounds_hold(
    ragged: bool, parallel: int, story: list[Asked], preferred: tuple[int, ...], delay: float
) -> None:
    seen = Seen()

    def block(first: int, rows: int) -> Block:
        numbers = range(first, first + rows)
        return [[number] * (1 + number % 7) for number in numbers] if ragged else np.array([[n, n, n] for n in numbers])

    async def tell() -> None:
        queue = Batcher(
            seen.run,
            max_batch_size=MOST_ROWS,
            max_queue_delay=delay,
            queue_limit=QUEUE_ROWS,
            queue_bytes=QUEUE_BYTES,
            parallel=parallel,
            length=len if ragged else None,
            batches=Distribution(ROWS),
            queue_seconds=Distribution(SECONDS),
            inference_seconds=Distribution(SECONDS),
            runs=Runs(),
            refused=seen.refuse,
            preferred=preferred,
        )
        tickets: list[tuple[Asked, list[int], Ticket]] = []
        first = 0
        for one in story:
            for _ in range(one.pause):
                await asyncio.sleep(0)
            numbers = list(range(first, first + one.rows))
            first += one.rows
            try:
                ticket = queue.submit(
                    block(numbers[0], one.rows),
                    one.wanted,
                    deadline=time.perf_counter() + (-1.0 if one.fate == "late" else 3600.0),
                    gone=(lambda: True) if one.fate == "gone" else lambda: False,
                    priority=one.priority,
                )
            except QueueFull:
                ticket = None
            assert 0 <= queue.waiting_rows <= QUEUE_ROWS
            assert 0 <= queue.waiting_bytes <= QUEUE_BYTES
            if ticket is not None:
                if one.fate == "cancelled":
                    ticket.future.cancel()
                tickets.append((one, numbers, ticket))
        found = await asyncio.gather(*(ticket.future for _, _, ticket in tickets), return_exceptions=True)
        run = Counter(row for batch in seen.batches for row in batch)
        for (one, numbers, ticket), value in zip(tickets, found, strict=True):
            if isinstance(value, BaseException):
                error = {"cancelled": asyncio.CancelledError, "gone": ClientGone, "late": DeadlinePassed}.get(one.fate)
                assert isinstance(value, QueueFull if error is None else (error, QueueFull)), (one, value)
                assert one.fate != "late" or not any(run[row] for row in numbers)
                continue
            assert one.fate in ("answered", "gone"), "a client that has gone is asked for after a while only"
            assert plain(value) == expected(numbers, one.wanted)
            assert [run[row] for row in numbers] == [1] * one.rows
            assert ticket.queued <= ticket.started <= ticket.finished
            assert 1 <= ticket.batch_rows <= MOST_ROWS
        while not queue.idle():
            await asyncio.sleep(0)
        assert (queue.waiting_rows, queue.waiting_bytes, queue.depth()) == (0, 0, 0)
        assert all(lane.rows == 0 and not lane for lane in queue.lanes.values())

    asyncio.run(asyncio.wait_for(tell(), 20))
    assert all(1 <= len(batch) <= MOST_ROWS for batch in seen.batches)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.sampled_from([-2, 0, 0, 1])), min_size=1, max_size=20))
def test_of_one_priority_who_came_first_goes_first(story: list[tuple[int, int]]) -> None:
    seen = Seen()

    async def tell() -> None:
        queue = Batcher(
            seen.run,
            max_batch_size=MOST_ROWS,
            max_queue_delay=0.0,
            queue_limit=1000,
            queue_bytes=10**9,
            parallel=0,
            length=None,
            batches=Distribution(ROWS),
            queue_seconds=Distribution(SECONDS),
            inference_seconds=Distribution(SECONDS),
            runs=Runs(),
            refused=seen.refuse,
        )
        first, waits = 0, []
        for rows, priority in story:
            block = np.arange(first, first + rows)
            first += rows
            later = time.perf_counter() + 3600
            waits.append(queue.submit(block, "logits", deadline=later, priority=priority).future)
        await asyncio.gather(*waits)

    asyncio.run(asyncio.wait_for(tell(), 20))
    order = [row for batch in seen.batches for row in batch]
    levels = [priority for rows, priority in story for _ in range(rows)]
    # All came within a moment: a level is a head start of a second.
    assert order == sorted(order, key=lambda row: (-levels[row], row))
