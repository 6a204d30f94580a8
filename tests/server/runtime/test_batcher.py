"""The batcher: who runs with whom, who gets which answer, and who never runs."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from server.histograms import Distribution
from server.metrics import ROWS, SECONDS
from server.runtime.batcher import (
    HEAD_START_SECONDS,
    Batcher,
    Block,
    ClientGone,
    DeadlinePassed,
    Overloaded,
    QueueFull,
    Run,
    RunFailed,
    Value,
    Wanted,
    alike,
)
from server.runtime.runs import Runs

LATER = 3600.0


class Recorder:
    """A session that answers every row with itself, keeps the batches, and can be held."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
        rows = [row for block in blocks for row in block]
        self.batches.append(rows)
        assert self.gate.wait(10)
        if "fail" in map(str, rows):
            raise RuntimeError("broken")
        return {
            one: np.array([f"{one}:{row}" for row in rows])
            if isinstance(one, str)
            else [np.array([f"{output}:{row}" for row in rows]) for output in one]
            for one in wanted
        }


def batcher(run: Run, **options: Any) -> Batcher:
    settings: dict[str, Any] = {
        "max_batch_size": 4,
        "max_queue_delay": 0.0,
        "queue_limit": 100,
        "queue_bytes": 10**9,
        "parallel": 1,
        "length": None,
        "batches": Distribution(ROWS),
        "queue_seconds": Distribution(SECONDS),
        "inference_seconds": Distribution(SECONDS),
        "runs": Runs(),
        "refused": lambda reason: None,
    }
    return Batcher(run, **{**settings, **options})


def within(seconds: float = LATER) -> float:
    return time.perf_counter() + seconds


async def held(run: Recorder, queue: Batcher) -> asyncio.Future[list[np.ndarray]]:
    """A first batch that runs until the gate opens."""
    run.gate.clear()
    first = queue.submit(["first"], "logits", deadline=within()).future
    while not run.batches:
        await asyncio.sleep(0.001)
    return first


@pytest.mark.parametrize("parallel", [0, 1, 3])
def test_an_idle_session_runs_a_request_at_once(parallel: int) -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run, parallel=parallel)
        answer = await asyncio.wait_for(queue.submit(["a"], "logits", deadline=within()).future, 5)
        assert [str(row) for row in answer] == ["logits:a"]
        assert run.batches == [["a"]]

    asyncio.run(story())


def test_only_a_batch_with_nothing_beside_it_runs_alone() -> None:
    async def story() -> None:
        run, alone = Recorder(), Recorder()
        queue = batcher(run, run_alone=alone, parallel=2)

        async def answered(rows: range) -> None:
            ticket = queue.submit(np.array(rows), "logits", deadline=within())
            assert [str(row) for row in await ticket.future] == [f"logits:{row}" for row in rows]

        await answered(range(1))
        await answered(range(1, 2))
        assert (run.batches, alone.batches) == ([], [[0], [1]])
        assert queue.run_times.expected(1) == 0.0, "how long it takes beside others is not known yet"
        await answered(range(2, 4))  # they share the two runs
        assert (sorted(run.batches), alone.batches[2:]) == ([[2], [3]], [])
        assert queue.run_times.expected(1) > 0.0
        await answered(range(4, 5))
        assert run.batches[2:] == [[4]], "where there was another a moment ago there may be one soon"
        alone.gate.clear()
        first = asyncio.create_task(answered(range(5, 6)))
        while len(alone.batches) < 3:
            await asyncio.sleep(0.001)
        await answered(range(6, 7))
        alone.gate.set()
        await first
        assert (run.batches[3:], alone.batches[2:]) == ([[6]], [[5]])

    asyncio.run(asyncio.wait_for(story(), 10))


def test_one_that_fails_alone_is_told_so() -> None:
    async def story() -> None:
        queue = batcher(Recorder(), run_alone=Recorder())
        with pytest.raises(RunFailed, match="broken"):
            await queue.submit(["fail"], "logits", deadline=within()).future
        assert [str(row) for row in await queue.submit(["a"], "logits", deadline=within()).future] == ["logits:a"]

    asyncio.run(asyncio.wait_for(story(), 10))


def test_what_arrives_during_a_run_is_the_next_batch_up_to_its_size() -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run)
        first = await held(run, queue)
        tickets = [queue.submit(np.array([i]), "logits", deadline=within()) for i in range(6)]
        assert queue.depth() == 6
        run.gate.set()
        await asyncio.gather(first, *(ticket.future for ticket in tickets))
        assert run.batches == [["first"], [0, 1, 2, 3], [4, 5]]

    asyncio.run(story())


def test_free_runs_share_what_waits_and_none_idles_while_rows_wait() -> None:
    async def story() -> None:
        run = Recorder()
        run.gate.clear()
        queue = batcher(run, parallel=2)
        early = queue.submit(np.arange(6), "logits", deadline=within())
        while len(run.batches) < 2:
            await asyncio.sleep(0.001)
        assert sorted(run.batches) == [[0, 1, 2], [3, 4, 5]]
        late = queue.submit(np.array([6, 7]), "logits", deadline=within())
        await asyncio.sleep(0.02)
        assert queue.depth() == 2
        run.gate.set()
        found = await asyncio.gather(early.future, late.future)
        assert [[str(row) for row in rows] for rows in found] == [
            [f"logits:{i}" for i in range(6)],
            ["logits:6", "logits:7"],
        ]

    asyncio.run(asyncio.wait_for(story(), 10))


@pytest.mark.parametrize("parallel", [0, 1, 3])
def test_everybody_gets_their_own_rows_in_their_order(parallel: int) -> None:
    async def story() -> None:
        queue = batcher(Recorder(), parallel=parallel, length=len, queue_limit=1000)

        async def ask(i: int) -> None:
            await asyncio.sleep((i % 7) / 1000)
            rows = [f"{i} {j} " + "x" * (j % 5) for j in range(1 + i % 9)]
            output = ("logits", "embedding")[i % 2]
            found = await queue.submit(rows, output, deadline=within()).future
            assert [str(row) for row in found] == [f"{output}:{row}" for row in rows]

        await asyncio.wait_for(asyncio.gather(*(ask(i) for i in range(60))), 30)
        assert queue.depth() == 0

    asyncio.run(asyncio.wait_for(story(), 60))


@pytest.mark.parametrize("parallel", [0, 1, 2])
def test_outputs_of_the_graph_come_as_arrays_and_a_large_block_is_cut(parallel: int) -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run, parallel=parallel)
        block = np.arange(11)
        tickets = [
            queue.submit(block, ("logits", "embedding"), deadline=within()),
            queue.submit(block[:2] + 20, "logits", deadline=within()),
        ]
        (logits, embedding), others = await asyncio.gather(*(ticket.future for ticket in tickets))
        assert logits.tolist() == [f"logits:{row}" for row in range(11)]
        assert embedding.tolist() == [f"embedding:{row}" for row in range(11)]
        assert others.tolist() == ["logits:20", "logits:21"]
        assert max(map(len, run.batches)) <= 4
        assert sorted(row for rows in run.batches for row in rows) == [*range(11), 20, 21]
        assert all(ticket.queued <= ticket.started <= ticket.finished for ticket in tickets)

    asyncio.run(asyncio.wait_for(story(), 10))


def test_a_block_that_runs_alone_reaches_the_session_uncopied() -> None:
    async def story() -> None:
        seen: list[Block] = []

        def run(blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
            seen.extend(blocks)
            return {"logits": np.asarray(blocks[0])}

        block = np.ones((4, 3), np.float32)
        found = await batcher(run).submit(block, "logits", deadline=within()).future
        assert seen[0] is block
        assert found is block

    asyncio.run(story())


def test_a_higher_priority_goes_first_and_nobody_starves() -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run, max_batch_size=1)
        first = await held(run, queue)
        asked = [("background", -1), ("normal", 0), ("urgent", 1), ("also normal", 0), ("most urgent", 3)]
        tickets = [queue.submit([name], "logits", deadline=within(), priority=level) for name, level in asked]
        old = queue.submit(["old"], "logits", deadline=within())
        old.turn -= 4 * HEAD_START_SECONDS  # as if it had come so much earlier
        old.lane.rotate(1)
        run.gate.set()
        await asyncio.gather(first, old.future, *(ticket.future for ticket in tickets))
        order = [row for [row] in run.batches[1:]]
        assert order == ["old", "most urgent", "urgent", "normal", "also normal", "background"]

    asyncio.run(story())


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run, queue_limit=3)
        first = await held(run, queue)
        kept = [queue.submit(np.array([i]), "logits", deadline=within()) for i in range(3)]
        with pytest.raises(QueueFull) as refused:
            queue.submit(["too many"], "logits", deadline=within())
        assert refused.value.retry_after >= 1
        run.gate.set()
        await asyncio.gather(first, *(ticket.future for ticket in kept))

    asyncio.run(story())


def test_a_queue_is_bounded_in_bytes_too() -> None:
    async def story() -> None:
        run, refused = Recorder(), []
        queue = batcher(run, queue_bytes=100, refused=refused.append)
        first = await held(run, queue)
        kept = queue.submit(np.zeros(10), "logits", deadline=within())
        with pytest.raises(QueueFull):
            queue.submit(np.zeros(3), "logits", deadline=within())
        run.gate.set()
        await asyncio.gather(first, kept.future)
        assert refused == ["queue_full"]
        assert (queue.waiting_rows, queue.waiting_bytes) == (0, 0)

    asyncio.run(story())


def test_one_of_higher_priority_takes_the_room_of_the_newest_of_the_lowest() -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run, queue_limit=3)
        first = await held(run, queue)
        low = [queue.submit(np.array([i]), "logits", deadline=within(), priority=-1) for i in range(2)]
        normal = queue.submit(np.array([2]), "logits", deadline=within())
        urgent = queue.submit(np.array([3]), "logits", deadline=within(), priority=2)
        with pytest.raises(QueueFull):
            await low[1].future
        with pytest.raises(QueueFull):
            queue.submit(np.array([4]), "logits", deadline=within(), priority=-1)
        run.gate.set()
        await asyncio.gather(first, low[0].future, normal.future, urgent.future)
        assert run.batches[1:] == [[3, 2, 0]]

    asyncio.run(story())


def test_what_could_not_be_answered_in_time_is_refused_at_once() -> None:
    async def story() -> None:
        run, refused = Recorder(), []
        queue = batcher(run, refused=refused.append)
        first = await held(run, queue)
        kept = [queue.submit(np.arange(10), "logits", deadline=within())]  # nothing is known yet
        queue.throughput.add(10.0, 1.0)  # ten rows a second: as long as those wait
        queue.run_times.add(4, 0.4)
        queue.ample = LATER
        with pytest.raises(Overloaded, match="about 1 s") as error:
            queue.submit(np.array([10]), "logits", deadline=within(1.2))
        assert error.value.retry_after == 1
        with pytest.raises(Overloaded):
            queue.admit(1.2, 0)
        kept.append(queue.submit(np.array([11]), "logits", deadline=within(60)))
        kept.append(queue.submit(np.array([12]), "logits", deadline=within(1.2), priority=1))  # nothing is before it
        late = queue.submit(np.array([13]), "logits", deadline=within(-1))
        with pytest.raises(DeadlinePassed):
            await late.future
        run.gate.set()
        await asyncio.gather(first, *(ticket.future for ticket in kept))
        assert refused == ["overload", "overload", "deadline"]

    asyncio.run(story())


def test_batches_are_cut_to_the_preferred_size_that_is_full() -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run, max_batch_size=16, preferred=[4, 8], max_queue_delay=0.02)
        first = await held(run, queue)
        tickets = [queue.submit(np.array([i]), "logits", deadline=within()) for i in range(15)]
        run.gate.set()
        await asyncio.gather(first, *(ticket.future for ticket in tickets))
        assert [len(rows) for rows in run.batches[1:]] == [8, 4, 3]
        await asyncio.wait_for(
            batcher(run, max_queue_delay=60.0, preferred=[2]).submit(np.arange(2), "logits", deadline=within()).future,
            5,
        )

    asyncio.run(story())


def test_a_request_past_its_deadline_costs_no_run() -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run)
        first = await held(run, queue)
        late = queue.submit(["late"], "logits", deadline=within(0.01))
        patient = queue.submit(["patient"], "logits", deadline=within())
        await asyncio.sleep(0.05)
        run.gate.set()
        with pytest.raises(DeadlinePassed):
            await late.future
        await asyncio.gather(first, patient.future)
        assert run.batches == [["first"], ["patient"]]

    asyncio.run(story())


def test_a_cancelled_request_costs_no_run() -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run)
        first = await held(run, queue)
        gone = queue.submit(["gone", "too"], "logits", deadline=within())
        stays = queue.submit(["stays"], "logits", deadline=within())
        gone.future.cancel()
        run.gate.set()
        await asyncio.gather(first, stays.future)
        assert run.batches == [["first"], ["stays"]]

    asyncio.run(story())


def test_a_request_whose_client_has_gone_costs_no_run() -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run)
        first = await held(run, queue)
        left = queue.submit(["gone", "too"], "logits", deadline=within(), gone=lambda: True)
        stays = queue.submit(["stays"], "logits", deadline=within(), gone=lambda: False)
        await asyncio.sleep(0.01)
        run.gate.set()
        with pytest.raises(ClientGone):
            await left.future
        await asyncio.gather(first, stays.future)
        assert run.batches == [["first"], ["stays"]]

    asyncio.run(story())


@pytest.mark.parametrize("parallel", [0, 1, 3])
def test_a_batch_that_fails_fails_alone(parallel: int) -> None:
    async def story() -> None:
        queue = batcher(Recorder(), parallel=parallel)
        with pytest.raises(RunFailed, match="broken"):
            await queue.submit(["fail"], "logits", deadline=within()).future
        assert len(await queue.submit(["well"], "logits", deadline=within()).future) == 1

    asyncio.run(story())


def test_with_a_delay_an_incomplete_batch_waits_and_a_full_one_does_not() -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run, max_queue_delay=0.05)
        early = queue.submit(["a"], "logits", deadline=within())
        await asyncio.sleep(0.01)
        assert run.batches == []
        await asyncio.gather(early.future, queue.submit(["b"], "logits", deadline=within()).future)
        assert run.batches == [["a", "b"]]
        slow = batcher(run, max_queue_delay=60.0)
        await asyncio.wait_for(slow.submit(np.arange(4), "logits", deadline=within()).future, 5)

    asyncio.run(story())


def test_the_oldest_row_always_runs_and_padding_stays_bounded() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths = random.integers(1, 500, random.integers(1, 80)).tolist()
        padding = random.choice([0.0, 0.1, 0.25])
        chosen = alike(lengths, 16, padding)
        assert chosen[0] == 0
        assert len(set(chosen)) == len(chosen) <= 16
        padded = max(lengths[i] for i in chosen) * len(chosen)
        assert sum(lengths[i] for i in chosen) >= (1.0 - padding) * padded - 1e-9


def test_texts_of_a_length_run_together() -> None:
    async def story() -> None:
        run = Recorder()
        queue = batcher(run, length=len)
        first = await held(run, queue)
        rows = ["s1", "a long text of many words", "s2", "s3", "another long text of many words", "s4"]
        tickets = [queue.submit([row], "logits", deadline=within()) for row in rows]
        run.gate.set()
        await asyncio.gather(first, *(ticket.future for ticket in tickets))
        assert run.batches[1:] == [["s1", "s2", "s3", "s4"], [rows[1], rows[4]]]

    asyncio.run(story())


def test_distributions_count_into_the_right_buckets() -> None:
    found = Distribution((1, 2, 4))
    for value in (0.5, 1, 1.5, 4, 100):
        found.observe(value)
    assert found.counts == [2, 1, 1, 1]
    assert found.sum == 107
