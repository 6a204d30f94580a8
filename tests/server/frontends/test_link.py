"""Both ends of the shared memory, here in one process: rows go over, answers come back, and so does what goes wrong."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.frontends import region
from server.frontends.engine import Bridge
from server.frontends.link import GONE_SECONDS, Link
from server.frontends.messages import LargeAnswer, LargeCall, Let
from server.frontends.remote import RemoteModel, RemoteRepository
from server.metrics import Metrics
from server.runtime.batcher import ClientGone, DeadlinePassed, QueueFull, RunFailed
from server.runtime.model import Model
from server.runtime.repository import Repository
from server.settings import Settings
from tests.server.bundles import (
    publish_generator,
    publish_greys,
    publish_halves,
    publish_heads,
    publish_series,
    publish_texts,
    publish_vectors,
)


class Ends:
    """A repository and what a front-end makes of it. large: how many calls and answers did not fit into the memory."""

    def __init__(self, settings: Settings) -> None:
        self.repository = Repository(settings, Metrics())
        memory = region.shared("test", region.BYTES)
        wakes = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.large = 0
        self.bridge = Bridge(region.Region(memory), wakes[0], wakes[1], self._answer, self.repository.metrics.rejected)
        self.link = Link(region.Region(memory), os.dup(wakes[0]), os.dup(wakes[1]), self._call)
        os.close(memory)
        self.let: list[int] = []
        self.remote = RemoteRepository(Metrics(), self.link, self._tell)

    async def serve(self) -> None:
        """Read the repository's folder anew, and tell the front-end."""
        await self.repository.refresh()
        await self.remote.serve(self.bridge.serve(1, self.repository))

    def model(self, name: str) -> RemoteModel:
        found = self.remote.get(name)
        assert isinstance(found, RemoteModel)
        return found

    def _call(self, message: LargeCall, descriptors: list[int]) -> None:
        self.large += 1
        self.bridge.large_call(message, *descriptors)

    def _answer(self, message: LargeAnswer, descriptors: list[int]) -> None:
        self.large += 1
        self.link.answered(region.whole(*descriptors))

    def _tell(self, message: Any) -> None:
        if isinstance(message, Let):
            self.let += message.numbers
            self.bridge.let(message.numbers)


def story(told: Callable[[Ends], Awaitable[None]], home: Path, **settings: Any) -> None:
    async def run() -> None:
        ends = Ends(Settings(home=home, **settings))
        await ends.serve()
        await told(ends)
        assert not ends.link.groups
        for _ in range(3):
            await asyncio.sleep(0)
        if not ends.link.lost:
            assert ends.link.slab.allocate(region.SLAB_BYTES) == 0, "all parts of the slab have been given back"

    asyncio.run(run())


def later(seconds: float = 60.0) -> float:
    return time.perf_counter() + seconds


def same(one: Any, other: Any) -> None:
    """Answers, arrays or lists of arrays or of dicts, are equal."""
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        if isinstance(mine, dict):
            assert mine.keys() == theirs.keys()
            same(list(mine.values()), list(theirs.values()))
        elif isinstance(mine, tuple):
            same(mine, theirs)
        else:
            np.testing.assert_array_equal(mine, theirs)


random = np.random.default_rng(0)
PIXELS = random.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
BLOCKS: list[tuple[Callable[[Path], Any], Any]] = [
    (publish_vectors, random.random((3, 2), dtype=np.float32)),
    (publish_heads, random.random((3, 2), dtype=np.float32)),
    (publish_halves, random.random((3, 2), dtype=np.float32)),
    (publish_greys, PIXELS),
    (publish_texts, [[2, 4, 3], [2, 3], [2, 1, 4, 1, 3]]),
    (publish_series, [random.random((steps, 2), dtype=np.float32) for steps in (3, 1, 7)]),
    (publish_generator, random.random((3, 3), dtype=np.float32)),
    (lambda folder: publish_generator(folder, beside=True), random.random((3, 2), dtype=np.float32)),
]


@pytest.mark.parametrize(("publish", "block"), BLOCKS)
def test_every_answer_of_every_kind_is_that_of_the_model(publish: Callable[[Path], Any], block: Any, tmp_path: Path):
    name = publish(tmp_path / "repository").name

    async def told(ends: Ends) -> None:
        here, there = ends.model(name), ends.repository.get(name)
        assert here.answers == there.answers
        outputs = tuple(output.name for output in there.manifest.outputs)
        asked: list[Any] = [*there.answers, outputs, outputs[::-1], outputs[:1]]
        for wanted in asked:
            rows = block
            if wanted == "generate" and here.generator is not None:
                rows = random.random((3, here.generator.latent), dtype=np.float32)
            ticket = here.submit(rows, wanted, deadline=later())
            found = await ticket.future
            same(found, await there.submit(rows, wanted, deadline=later()).future)
            assert 0 < ticket.queued <= ticket.started <= ticket.finished
            assert 1 <= ticket.batch_rows <= 3
            assert ticket.inference > 0

    story(told, tmp_path)


def test_requests_of_one_turn_cross_together_and_each_gets_its_own_answer(tmp_path: Path):
    publish_vectors(tmp_path / "repository")

    async def told(ends: Ends) -> None:
        model = ends.model("points")
        rows = [random.random((count, 2), dtype=np.float32) for count in (1, 2, 1, 3, 1)]
        tickets = [model.submit(block, "embedding", deadline=later(60 + 1e-6 * i)) for i, block in enumerate(rows)]
        await asyncio.sleep(0)
        assert len(ends.link.groups) <= 2
        for block, ticket in zip(rows, tickets, strict=True):
            same(await ticket.future, await model.submit(block, "embedding", deadline=later()).future)
        queued = ends.remote.metrics.stages.labels("points", "1", "queue").counts
        elsewhere = ends.repository.metrics.stages.labels("points", "1", "queue").counts
        assert sum(queued) + sum(elsewhere) == 10

    story(told, tmp_path)


def test_while_calls_are_under_way_what_comes_goes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish_vectors(tmp_path / "repository")

    async def told(ends: Ends) -> None:
        model = ends.model("points")
        sent: list[int] = []
        send = ends.link._send
        monkeypatch.setattr(ends.link, "_send", lambda one, part: (sent.append(len(part)), send(one, part)))
        rows = [np.full((1, 2), number, np.float32) for number in range(8)]
        tickets = []
        for block in rows:  # one a turn of the loop, and none of the calls is seen there yet
            tickets.append(model.submit(block, ("embedding",), deadline=later()))
            ends.link._flush()
        assert sent == [1] * model.most_calls
        urgent = model.submit(rows[0], ("embedding",), deadline=later(0.5))
        ends.link._flush()
        assert sent == [1] * (model.most_calls + 1)
        found = await asyncio.gather(*(ticket.future for ticket in [*tickets, urgent]))
        for block, [mine] in zip([*rows, rows[0]], found, strict=True):
            [theirs] = await ends.repository.get("points").submit(block, ("embedding",), deadline=later()).future
            np.testing.assert_array_equal(mine, theirs)
        assert sum(sent) == 9
        assert len(sent) == model.most_calls + 2

    story(told, tmp_path)


def test_where_the_queue_has_room_for_some_these_are_answered(tmp_path: Path):
    publish_vectors(tmp_path / "repository")

    async def told(ends: Ends) -> None:
        model = ends.model("points")
        deadline = later()
        tickets = [model.submit(np.full((1, 2), i, np.float32), "embedding", deadline=deadline) for i in range(12)]
        found = await asyncio.gather(*(ticket.future for ticket in tickets), return_exceptions=True)
        full = [error for error in found if isinstance(error, QueueFull)]
        assert len(full) == 7
        assert ends.repository.metrics.rejected == {("points", "queue_full"): 7}
        assert all(error.retry_after >= 1 for error in full)
        assert not any(isinstance(error, QueueFull) for error in found[:5])

    story(told, tmp_path, queue_limit=5)


def test_what_does_not_fit_into_the_memory_crosses_all_the_same(tmp_path: Path):
    publish_vectors(tmp_path / "repository")

    async def told(ends: Ends) -> None:
        model = ends.model("points")
        place = ends.link.slab.allocate(region.SLAB_BYTES)
        assert place is not None
        rows = random.random((600_000, 2), dtype=np.float32)
        found = await model.submit(rows, ("embedding",), deadline=later()).future
        assert ends.large == 2
        same(found, await ends.repository.get("points").submit(rows, ("embedding",), deadline=later()).future)
        ends.link.slab.release(place, region.SLAB_BYTES)

    story(told, tmp_path, queue_limit=1_000_000)


def test_a_deadline_is_the_same_on_both_sides(tmp_path: Path):
    publish_vectors(tmp_path / "repository")

    async def told(ends: Ends) -> None:
        with pytest.raises(DeadlinePassed):
            await ends.model("points").submit(np.zeros((1, 2), np.float32), "classify", deadline=later(-1)).future

    story(told, tmp_path)


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish_vectors(tmp_path / "repository")

    async def told(ends: Ends) -> None:
        batcher = ends.repository.get("points").batcher
        assert batcher is not None

        def broken(blocks: Any, wanted: Any) -> Any:
            raise RuntimeError("the device is on fire")

        monkeypatch.setattr(batcher, "run", broken)
        monkeypatch.setattr(batcher, "run_alone", None)
        with pytest.raises(RunFailed, match="the device is on fire"):
            await ends.model("points").submit(np.zeros((1, 2), np.float32), "classify", deadline=later()).future

    story(told, tmp_path)


def test_rows_that_are_none_of_the_model_fail_alone(tmp_path: Path):
    publish_vectors(tmp_path / "repository")

    async def told(ends: Ends) -> None:
        model = ends.model("points")
        wrong = model.submit(np.zeros((1, 3), np.float32), "classify", deadline=later())
        right = model.submit(np.zeros((1, 2), np.float32), "embedding", deadline=later())
        with pytest.raises(RunFailed):
            await wrong.future
        assert len(await right.future) == 1

    story(told, tmp_path)


def test_a_call_whose_clients_have_all_gone_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish_vectors(tmp_path / "repository")

    async def told(ends: Ends) -> None:
        batcher = ends.repository.get("points").batcher
        assert batcher is not None
        ran: list[int] = []
        run = batcher.run

        def counted(blocks: Any, wanted: Any) -> Any:
            ran.append(sum(map(len, blocks)))
            return run(blocks, wanted)

        monkeypatch.setattr(batcher, "run", counted)
        monkeypatch.setattr(batcher, "run_alone", None)
        monkeypatch.setattr(batcher, "max_queue_delay", 6 * GONE_SECONDS)
        model = ends.model("points")
        gone = model.submit(np.zeros((2, 2), np.float32), "classify", deadline=later(), gone=lambda: True)
        there = model.submit(np.zeros((1, 2), np.float32), "embedding", deadline=later(), gone=lambda: False)
        with pytest.raises(ClientGone):
            await gone.future
        await there.future
        assert ran == [1]

    story(told, tmp_path)


def test_a_version_lives_until_the_front_end_is_done_with_it(tmp_path: Path):
    publish_vectors(tmp_path / "repository")

    async def told(ends: Ends) -> None:
        first, there = ends.model("points"), ends.repository.get("points")
        first.requests += 1
        publish_vectors(tmp_path / "repository")
        await ends.serve()
        assert ends.model("points").version == 2
        await asyncio.sleep(0.05)
        assert ends.let == []
        assert there.requests == 1
        await first.submit(np.zeros((1, 2), np.float32), "classify", deadline=later()).future
        first.requests -= 1
        await asyncio.sleep(0.05)
        assert ends.let == [first.number]
        assert there.requests == 0

    story(told, tmp_path)


def test_a_front_end_that_ends_frees_what_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish_vectors(tmp_path / "repository")

    async def told(ends: Ends) -> None:
        there: Model = ends.repository.get("points")
        assert there.batcher is not None
        monkeypatch.setattr(there.batcher, "max_queue_delay", 0.05)
        ticket = ends.model("points").submit(np.zeros((1, 2), np.float32), "classify", deadline=later())
        while not there.batcher.depth():
            await asyncio.sleep(0.001)
        ends.bridge.close()
        await asyncio.wait_for(ends.repository.stop(), 5)
        assert there.requests == 0
        ends.link.lose()
        with pytest.raises(Exception, match="inference process has stopped"):
            await ticket.future
        after = ends.model("points").submit(np.zeros((1, 2), np.float32), "classify", deadline=later())
        with pytest.raises(Exception, match="inference process has stopped"):
            await after.future

    story(told, tmp_path)
