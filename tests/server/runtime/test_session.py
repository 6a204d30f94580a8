"""A graph on the CPU: how many threads it has, beside others and alone."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from export.bundle import Manifest
from server.metrics import Metrics
from server.runtime import batcher, model, session
from server.runtime.deployment import Deployment
from server.runtime.model import Model, load
from server.runtime.placement import Placement, placement
from server.runtime.session import CPU, Inputs, RunOn, Session
from server.settings import Settings
from tests.server.bundles import publish_generator, publish_vectors

POINT = {"vector": np.array([[0.5, 1.0]], np.float32)}


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "cores", lambda: 4)


def graph(repository: Path) -> Path:
    return repository / publish_vectors(repository).name / "1" / "model.onnx"


@pytest.mark.parametrize(("alone_takes", "kept"), [(0.5, True), (0.95, False), (2.0, False)])
def test_a_second_session_is_kept_where_it_is_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone_takes: float, kept: bool
) -> None:
    monkeypatch.setattr(session, "DOUBTFUL_SECONDS", 0.01)
    found = Session(graph(tmp_path), Placement(providers=(CPU,), alone=True))

    def seconds(run: RunOn) -> float:
        return alone_takes if run == found.run_alone else 1.0

    found.spread(seconds)
    assert (found.alone is not None) == kept
    assert found.inner is not None
    assert found.inner.get_session_options().intra_op_num_threads == 1
    if found.alone is not None:
        assert found.alone.get_session_options().intra_op_num_threads == 4
    assert np.array_equal(found.run_alone(POINT, ["logits"])[0], found.run(POINT, ["logits"])[0])


def test_one_bad_moment_does_not_decide(tmp_path: Path) -> None:
    found = Session(graph(tmp_path), Placement(providers=(CPU,), alone=True))
    alone_takes = iter([1.0, 1.2, 0.5])
    found.spread(lambda run: next(alone_takes) if run == found.run_alone else 1.0)
    assert found.alone is not None


@pytest.mark.parametrize("asked", [Placement(providers=(CPU,)), Placement(providers=(CPU,), alone=True, threads=4)])
def test_it_is_not_opened_where_it_is_not_wanted(tmp_path: Path, asked: Placement) -> None:
    found = Session(graph(tmp_path), asked)
    found.spread(lambda run: pytest.fail("nothing is to be timed"))
    assert found.alone is None


@pytest.mark.parametrize(
    ("settings", "deployment", "alone"),
    [
        ({}, Deployment(), True),
        ({"intra_op_threads": 2}, Deployment(), False),
        ({}, Deployment(intra_op_threads=2), False),
        ({"model_memory_bytes": 10**9}, Deployment(), False),
    ],
)
def test_where_threads_or_memory_are_counted_out_there_is_one(
    tmp_path: Path, settings: dict[str, int], deployment: Deployment, alone: bool
) -> None:
    manifest = publish_vectors(tmp_path)
    assert placement(Settings(home=tmp_path, **settings), deployment, manifest).alone == alone


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small graphs pass for large ones, that are worth a thread and a session of all cores."""
    monkeypatch.setattr(model, "INLINE_SECONDS", 0.0)
    monkeypatch.setattr(session, "WORTH_A_SESSION", float("inf"))


@pytest.mark.usefixtures("large")
def test_a_lone_request_has_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = publish_vectors(tmp_path)
    loaded = cpu_model(tmp_path, manifest)
    assert loaded.session is not None
    calls = recorded(monkeypatch, loaded.session)

    async def story() -> None:
        served = Model(loaded, Metrics(), Settings(home=tmp_path))
        first = await answer(served, 1)
        assert calls == ["run_alone"]
        many = await answer(served, 8)
        assert set(calls[1:]) == {"run"}, "rows that can be shared out are"
        assert np.array_equal(many[0], first[0])
        await served.close()

    asyncio.run(asyncio.wait_for(story(), 20))


@pytest.mark.usefixtures("large")
def test_so_has_the_graph_that_makes_images(tmp_path: Path) -> None:
    loaded = cpu_model(tmp_path, publish_generator(tmp_path, beside=True))
    assert loaded.images is not None
    assert loaded.images.alone is not None
    assert loaded.most_images is not None


def cpu_model(repository: Path, manifest: Manifest) -> model.Loaded:
    settings = Settings(home=repository, providers=[CPU])
    return load(repository / manifest.name / str(manifest.version), settings, Deployment())


def recorded(monkeypatch: pytest.MonkeyPatch, of: Session) -> list[str]:
    """Which of the two ran, in order."""
    calls: list[str] = []
    run, run_alone = of.run, of.run_alone

    def noted_run(inputs: Inputs, outputs: list[str]) -> list[np.ndarray]:
        calls.append("run")
        return run(inputs, outputs)

    def noted_alone(inputs: Inputs, outputs: list[str]) -> list[np.ndarray]:
        calls.append("run_alone")
        return run_alone(inputs, outputs)

    monkeypatch.setattr(of, "run", noted_run)
    monkeypatch.setattr(of, "run_alone", noted_alone)
    return calls


async def answer(served: Model, rows: int) -> list[np.ndarray]:
    block: batcher.Block = np.repeat(POINT["vector"], rows, axis=0)
    ticket = served.submit(block, ("logits",), deadline=time.perf_counter() + 10)
    found: list[np.ndarray] = await ticket.future
    return [found[0][:1]]
