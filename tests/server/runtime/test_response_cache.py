"""Answers that are kept: what counts as equal, how long and how much is kept, and what equal requests share."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.metrics import Metrics
from server.runtime import deployment
from server.runtime.batcher import ClientGone, DeadlinePassed, RunFailed, Ticket
from server.runtime.deployment import Cache, Deployment
from server.runtime.repository import Repository
from server.runtime.response_cache import OVERHEAD_BYTES, ResponseCache, key_of
from server.settings import Settings
from tests.server.bundles import publish_vectors
from tests.server.runtime.test_batcher import Recorder, batcher, held, within

ROW = np.float32([[1, 2]])


class Asking:
    """A cache before a batcher whose session can be held."""

    def __init__(self, ttl_seconds: float = 60.0, max_bytes: int = 10**6) -> None:
        self.run = Recorder()
        self.queue = batcher(self.run, max_batch_size=1)
        self.counts: Counter[str] = Counter()
        self.cache = ResponseCache(ttl_seconds, max_bytes, self.count)

    def count(self, event: str) -> None:
        self.counts[event] += 1

    def submit(self, block: Any, wanted: Any = "logits", seconds: float = 60.0, gone: Any = None) -> Ticket:
        return self.cache.submit(
            block, wanted, deadline=within(seconds), gone=gone, priority=0, submit=self.queue.submit
        )


def test_equal_rows_are_run_once_and_others_are_not_taken_for_them() -> None:
    async def story() -> None:
        asking = Asking()
        blocks = [ROW, ROW + 1, np.concatenate([ROW, ROW]), ROW.astype(np.float64), np.float32([[1], [2]])]
        for wanted in ("logits", "embedding", ("logits",), ("logits", "embedding")):
            for block in blocks:
                first = asking.submit(block, wanted)
                before = await first.future
                again = asking.submit(block.copy(), wanted)
                after = await again.future
                assert [str(one) for one in before] == [str(one) for one in after]
                assert (first.cached, again.cached) == (False, True)
        assert asking.counts == {"hits": 20, "misses": 20}

    asyncio.run(asyncio.wait_for(story(), 20))


def test_tokens_are_equal_however_they_are_held() -> None:
    rows = [[1, 2, 3], [4]]
    assert key_of(rows, "x") == key_of([np.int32(row) for row in rows], "x")
    assert key_of(rows, "x") != key_of([[1, 2], [3, 4]], "x")
    assert key_of(rows, "x") != key_of([[1, 2, 3, 4]], "x")
    series = np.float32([[1], [2]])
    assert key_of([series], "x") == key_of([series.copy()], "x") != key_of([series + 1], "x")


def test_an_answer_is_kept_for_its_time() -> None:
    async def story() -> None:
        asking = Asking(ttl_seconds=0.03)
        await asking.submit(ROW).future
        await asking.submit(ROW).future
        await asyncio.sleep(0.04)
        await asking.submit(ROW).future
        assert asking.counts == {"hits": 1, "misses": 2}
        assert len(asking.cache.kept) == 1

    asyncio.run(story())


def test_the_least_recently_used_answers_make_room() -> None:
    async def story() -> None:
        size = OVERHEAD_BYTES + np.array(["logits:[1. 2.]"]).nbytes
        asking = Asking(max_bytes=2 * size)
        for row in (ROW, ROW + 1, ROW, ROW + 2, ROW, ROW + 1):  # 1 goes when 2 comes, as 0 was used since
            await asking.submit(row).future
            assert asking.cache.bytes <= 2 * size
        assert asking.counts == {"hits": 2, "misses": 4, "evictions": 2}
        small = Asking(max_bytes=size - 1)
        await small.submit(ROW).future
        await small.submit(ROW).future
        assert (small.counts["misses"], small.cache.bytes) == (2, 0)

    asyncio.run(story())


def test_what_is_kept_is_apart_from_its_batch_and_cannot_be_written_to() -> None:
    async def story() -> None:
        asking = Asking()
        given = await asking.submit(ROW).future
        given[:] = "spoiled"
        kept = await asking.submit(ROW).future
        assert kept.base is None
        assert kept.tolist() == ["logits:[1. 2.]"]
        with pytest.raises(ValueError, match="read-only"):
            kept[:] = "spoiled"

    asyncio.run(story())


def test_equal_requests_that_are_open_share_one_run() -> None:
    async def story() -> None:
        asking = Asking()
        await held(asking.run, asking.queue)
        tickets = [asking.submit(ROW.copy()) for _ in range(5)]
        assert asking.queue.depth() == 1
        asking.run.gate.set()
        found = await asyncio.gather(*(ticket.future for ticket in tickets))
        assert [one.tolist() for one in found] == [["logits:[1. 2.]"]] * 5
        assert len(asking.run.batches) == 2
        assert [ticket.cached for ticket in tickets] == [False] + [True] * 4
        assert {ticket.started for ticket in tickets} == {tickets[0].started}

    asyncio.run(story())


@pytest.mark.parametrize("why", ["cancelled", "gone", "deadline"])
def test_another_takes_the_place_of_one_that_is_given_up(why: str) -> None:
    async def story() -> None:
        asking = Asking()
        first = await held(asking.run, asking.queue)
        left = asking.submit(ROW, seconds=0.005 if why == "deadline" else 60.0, gone=lambda: why == "gone")
        others = [asking.submit(ROW) for _ in range(3)]
        if why == "cancelled":
            left.future.cancel()
        await asyncio.sleep(0.02)
        others[0].future.cancel()  # nor does this one wait
        asking.run.gate.set()
        await first
        error = {"cancelled": asyncio.CancelledError, "gone": ClientGone, "deadline": DeadlinePassed}[why]
        with pytest.raises(error):
            await left.future
        found = await asyncio.gather(*(ticket.future for ticket in others[1:]))
        assert [one.tolist() for one in found] == [["logits:[1. 2.]"]] * 2
        assert len(asking.run.batches) == 2
        assert not asking.cache.open
        assert (await asking.submit(ROW).future).tolist() == ["logits:[1. 2.]"]

    asyncio.run(asyncio.wait_for(story(), 10))


def test_the_failure_of_a_run_is_everybodys_and_is_not_kept() -> None:
    async def story() -> None:
        asking = Asking()
        first = await held(asking.run, asking.queue)
        tickets = [asking.submit(np.array(["fail"]), "logits") for _ in range(3)]
        asking.run.gate.set()
        await first
        for ticket in tickets:
            with pytest.raises(RunFailed, match="broken"):
                await ticket.future
        with pytest.raises(RunFailed):
            await asking.submit(np.array(["fail"]), "logits").future
        assert len(asking.run.batches) == 3

    asyncio.run(story())


def test_a_model_keeps_answers_where_its_deployment_says_so(tmp_path: Path) -> None:
    async def story() -> None:
        settings = Settings(home=tmp_path)
        for name in ("kept", "plain"):
            publish_vectors(settings.repository, name)
        deployment.write(settings.repository / "kept", Deployment(cache=Cache(60.0, 10**6)))
        metrics = Metrics()
        repository = Repository(settings, metrics)
        await repository.start()
        answers = []
        for name in ("kept", "plain"):
            model = repository.get(name)
            for expected in (False, name == "kept"):
                ticket = model.submit(np.float32([[0, 5]]), "classify", deadline=within())
                answers.append(np.asarray(await ticket.future).tolist())
                assert ticket.cached == expected
        assert answers == [answers[0]] * 4
        await repository.stop()
        text = metrics.render().decode()
        assert 'espalier_cache_hits_total{model="kept"} 1' in text
        assert 'espalier_cache_misses_total{model="kept"} 1' in text
        assert 'model="plain"}' not in "".join(line for line in text.splitlines() if "cache" in line)

    asyncio.run(story())
