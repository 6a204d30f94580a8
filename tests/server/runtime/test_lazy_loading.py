"""Models that are loaded when they are first asked for, within the memory that models may take."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from server.metrics import Metrics
from server.runtime.deployment import All, Deployment, write
from server.runtime.footprint import footprint
from server.runtime.repository import CannotLoad, NotLoaded, Repository, UnknownModel
from server.settings import Settings
from tests.server.bundles import publish_constant

BALLAST = 100_000


async def answer(repository: Repository, reference: str) -> tuple[int, float]:
    """As a request is answered: the version that does, and what it says."""
    while True:
        try:
            model = repository.get(reference)
            break
        except NotLoaded:
            await repository.load(reference)
    model.requests += 1
    try:
        found = await model.submit(np.zeros((1, 2), np.float32), "predict", deadline=time.perf_counter() + 30).future
        return model.version, float(found[0][0][0])
    finally:
        model.requests -= 1


def ready(repository: Repository) -> list[tuple[str, int]]:
    return [(entry.name, entry.version) for entry in repository.index() if entry.state == "ready"]


def told(tmp_path: Path, story: Callable[[Repository], Awaitable[None]], **settings: object) -> None:
    """Tell a story of a repository that is looked through by nobody else."""

    async def whole() -> None:
        given = Settings(home=tmp_path, poll_seconds=1000.0, **settings)  # type: ignore[arg-type]
        repository = Repository(given, Metrics())
        await repository.start()
        try:
            await story(repository)
        finally:
            await repository.stop()

    asyncio.run(whole())


def folder(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def test_a_lazy_model_is_loaded_once_by_all_who_ask_for_it(tmp_path: Path) -> None:
    publish_constant(folder(tmp_path), "one", 1.0)
    write(folder(tmp_path) / "one", Deployment(lazy=True))
    publish_constant(folder(tmp_path), "two", 2.0)

    async def story(repository: Repository) -> None:
        assert ready(repository) == [("two", 1)]
        assert repository.index()[0].reason == "loaded when it is asked for"
        assert sorted(repository.views) == ["one", "two"]
        answers = await asyncio.gather(*(answer(repository, "one") for _ in range(20)))
        assert answers == [(1, 1.0)] * 20
        assert b'espalier_model_loads_total{model="one",outcome="loaded"} 1.0' in repository.metrics.render()

    told(tmp_path, story)


def test_the_one_that_was_not_used_for_the_longest_time_makes_room(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    for i, name in enumerate(names):
        manifest = publish_constant(folder(tmp_path), name, float(i), ballast=BALLAST)
    room = footprint(manifest)

    async def story(repository: Repository) -> None:
        for name in "abc":
            await answer(repository, name)
        await answer(repository, "a")
        assert ready(repository) == [("a", 1), ("b", 1), ("c", 1)]
        assert (await answer(repository, "d")) == (1, 3.0)
        assert ready(repository) == [("a", 1), ("c", 1), ("d", 1)]
        assert b'espalier_model_evictions_total{model="b"} 1.0' in repository.metrics.render()
        rounds = await asyncio.gather(*(answer(repository, names[i % 4]) for i in range(60)))
        assert rounds == [(1, float(i % 4)) for i in range(60)]
        assert repository.memory.taken <= 3 * room

    told(tmp_path, story, lazy=True, model_memory_bytes=3 * room + 10)


def test_models_that_are_not_lazy_count_and_stay(tmp_path: Path) -> None:
    for name in ("first", "last", "lazy"):
        manifest = publish_constant(folder(tmp_path), name, 1.0, ballast=BALLAST)
    write(folder(tmp_path) / "lazy", Deployment(lazy=True))

    async def story(repository: Repository) -> None:
        with pytest.raises(CannotLoad, match="taken by models that are not evicted") as raised:
            await answer(repository, "lazy")
        assert raised.value.retry_after is not None
        assert ready(repository) == [("first", 1), ("last", 1)]
        assert (await answer(repository, "first")) == (1, 1.0)

    told(tmp_path, story, model_memory_bytes=int(2.5 * footprint(manifest)))


def test_an_evicted_model_still_answers_who_holds_it(tmp_path: Path) -> None:
    publish_constant(folder(tmp_path), "a", 1.0, ballast=BALLAST)
    manifest = publish_constant(folder(tmp_path), "b", 2.0, ballast=BALLAST)

    async def story(repository: Repository) -> None:
        await answer(repository, "a")
        held = repository.get("a")
        held.requests += 1
        asked = asyncio.create_task(answer(repository, "b"))
        while repository.ready["a"]:
            await asyncio.sleep(0.001)
        assert [entry.state for entry in repository.index()] == ["unloading", "loading"]
        found = await held.submit(np.zeros((1, 2), np.float32), "predict", deadline=float("inf")).future
        assert found[0][0][0] == 1.0
        assert not asked.done()
        held.requests -= 1
        assert await asked == (1, 2.0)

    told(tmp_path, story, lazy=True, model_memory_bytes=int(1.5 * footprint(manifest)))


def test_a_new_version_of_a_lazy_model_in_use_takes_its_place(tmp_path: Path) -> None:
    publish_constant(folder(tmp_path), "one", 1.0)

    async def story(repository: Repository) -> None:
        assert await answer(repository, "one") == (1, 1.0)
        publish_constant(folder(tmp_path), "one", 2.0)
        await repository.refresh()
        assert ready(repository) == [("one", 2)]
        assert repository.get("one").version == 2
        with pytest.raises(UnknownModel, match="version '1' of one is not loaded"):
            repository.get("one:1")

    told(tmp_path, story, lazy=True)


def test_a_lazy_version_that_does_not_load_is_passed_over(tmp_path: Path) -> None:
    publish_constant(folder(tmp_path), "one", 1.0)
    publish_constant(folder(tmp_path), "one", 2.0)
    (folder(tmp_path) / "one" / "2" / "model.onnx").write_bytes(b"no graph")

    async def story(repository: Repository) -> None:
        assert await answer(repository, "one") == (1, 1.0)
        with pytest.raises(UnknownModel, match=r"version '2' of one is not loaded .*model\.onnx: sha256"):
            await answer(repository, "one:2")

    told(tmp_path, story, lazy=True)


def test_what_is_unloaded_by_request_stays_so_until_it_is_loaded(tmp_path: Path) -> None:
    for number in (1.0, 2.0, 3.0):
        publish_constant(folder(tmp_path), "one", number)
    write(folder(tmp_path) / "one", Deployment(versions=All()))

    async def story(repository: Repository) -> None:
        await repository.unload("one", 3)
        assert ready(repository) == [("one", 1), ("one", 2)]
        assert await answer(repository, "one") == (2, 2.0)
        await repository.unload("one")
        with pytest.raises(UnknownModel, match="unloaded by request"):
            await answer(repository, "one")
        publish_constant(folder(tmp_path), "one", 4.0)
        await repository.refresh()
        assert ready(repository) == []
        assert (await repository.load("one:2")).version == 2
        assert ready(repository) == [("one", 2)]
        assert (await repository.load("one")).version == 4
        assert len(ready(repository)) == 4

    told(tmp_path, story)


def test_a_version_outside_the_policy_is_loaded_by_request_and_stays(tmp_path: Path) -> None:
    publish_constant(folder(tmp_path), "one", 1.0)
    publish_constant(folder(tmp_path), "one", 2.0)

    async def story(repository: Repository) -> None:
        await repository.load("one:1")
        assert await answer(repository, "one:1") == (1, 1.0)
        assert await answer(repository, "one") == (2, 2.0)
        publish_constant(folder(tmp_path), "one", 3.0)
        await repository.refresh()
        assert ready(repository) == [("one", 1), ("one", 3)]
        await repository.unload("one", 1)
        assert ready(repository) == [("one", 3)]
        with pytest.raises(UnknownModel):
            await repository.load("one:9")

    told(tmp_path, story)


def test_a_mended_version_is_tried_again(tmp_path: Path) -> None:
    publish_constant(folder(tmp_path), "one", 1.0)
    publish_constant(folder(tmp_path), "one", 2.0)
    second = folder(tmp_path) / "one" / "2"
    shutil.copytree(second, tmp_path / "whole")
    (second / "model.onnx").write_bytes(b"no graph")

    async def story(repository: Repository) -> None:
        assert await answer(repository, "one") == (1, 1.0)
        with pytest.raises(CannotLoad, match="one:2 does not load"):
            await repository.load("one:2")
        shutil.copy(tmp_path / "whole" / "model.onnx", second / "model.onnx")
        (second / "manifest.json").touch()
        await repository.refresh()
        assert await answer(repository, "one") == (2, 2.0)

    told(tmp_path, story)


def test_a_new_name_is_waited_for_while_it_loads(tmp_path: Path) -> None:
    async def story(repository: Repository) -> None:
        publish_constant(folder(tmp_path), "new", 7.0)
        looking = asyncio.create_task(repository.refresh())
        while "new" not in repository.views:
            await asyncio.sleep(0)
        assert await answer(repository, "new") == (1, 7.0)
        await looking

    told(tmp_path, story)
