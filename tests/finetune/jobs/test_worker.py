"""The worker and its executor: killed, stopped and cancelled, with a real job."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from export import bundle
from export.bundle import sha256_of
from finetune.data.files import FileStore
from finetune.data.validation import inspect
from finetune.jobs.executors.local import LocalExecutor
from finetune.jobs.states import FINISHED, State
from finetune.jobs.store import Job, JobStore, opened
from finetune.recipe import Hyperparameters, Recipe
from models.spec import ModelSpec

pytestmark = pytest.mark.slow

SECONDS = 240


def digits_recipe(file_id: str, epochs: int) -> Recipe:
    return Recipe(
        model=ModelSpec(architecture="mlp", hyperparameters={"hidden": [256, 256], "dropout": 0.2}),
        training_file=file_id,
        seed=5,
        name="digits",
        hyperparameters=Hyperparameters(n_epochs=epochs, batch_size=32, learning_rate=0.003),
        checkpoint_seconds=0.3,
    )


class Home:
    """A home with the digits uploaded, a store, and an executor."""

    def __init__(self, folder: Path, store: JobStore) -> None:
        self.folder, self.store = folder, store
        self.repository = folder / "repository"
        self.executor = LocalExecutor(
            database=f"sqlite:///{folder}/espalier.db", home=folder, repository=self.repository, backbones={}
        )

    def upload(self) -> str:
        data = load_digits()
        header = ",".join([*(f"p{i}" for i in range(64)), "label"])
        rows = [",".join([*map(str, x.astype(int)), str(y)]) for x, y in zip(data.data, data.target, strict=True)]
        content = "\n".join([header, *rows, ""]).encode()

        async def chunks() -> AsyncIterator[bytes]:
            yield content

        files = FileStore(self.folder / "files")
        received = asyncio.run(files.receive(chunks(), 10**9))
        path = files.accept(received)
        report = inspect(path, "digits.csv")
        assert report.items == 1797
        import msgspec

        self.store.add_file(
            id=received.id,
            filename="digits.csv",
            purpose="fine-tune",
            bytes=received.bytes,
            sha256=received.sha256,
            report=msgspec.json.encode(report).decode(),
        )
        return received.id

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        await self.executor.start()
        try:
            yield
        finally:
            await self.executor.stop()

    async def until(self, job_id: str, condition: Callable[[Job], bool]) -> Job:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            job = self.store.get_job(job_id)
            if condition(job):
                return job
            await asyncio.sleep(0.02)
        log = (self.folder / "worker.log").read_text()[-3000:]
        raise AssertionError(f"job {job_id} is {self.store.get_job(job_id).state} after {SECONDS} s\n{log}")

    def deaths(self, job: Job) -> int:
        return sum("signal 9" in event.message for event in self.store.list_events(job.id, limit=10_000)[0])

    def weights(self, job: Job) -> str:
        assert job.result is not None, job.error
        folder = self.repository / job.result.name / str(job.result.version)
        bundle.verify(folder)
        return sha256_of(folder / "weights.safetensors").sha256


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with opened(f"sqlite:///{tmp_path}/espalier.db") as store:
        yield Home(tmp_path, store)


def finished(job: Job) -> bool:
    return job.state in FINISHED


def test_a_job_killed_three_times_ends_with_the_weights_of_an_undisturbed_run(home: Home) -> None:
    recipe = digits_recipe(home.upload(), epochs=100)
    kills = sorted(random.Random(time.time()).uniform(0.0, 0.75) for _ in range(3))

    async def story() -> tuple[Job, Job]:
        async with home.working():
            undisturbed = home.store.create_job(recipe, "digits").id
            calm = await home.until(undisturbed, finished)
            steps = calm.metrics["total_steps"]
            disturbed = home.store.create_job(recipe, "digits").id
            for number, share in enumerate(kills, start=1):
                await home.until(
                    disturbed, lambda job, s=share: job.metrics.get("step", 0) >= s * steps or finished(job)
                )
                assert home.executor.pid is not None
                os.kill(home.executor.pid, signal.SIGKILL)
                await home.until(disturbed, lambda job, n=number: home.deaths(job) == n or finished(job))
            return calm, await home.until(disturbed, finished)

    calm, disturbed = asyncio.run(story())
    assert home.deaths(disturbed) == 3, f"killed at {kills}"
    assert disturbed.state is State.SUCCEEDED, disturbed.error
    assert home.weights(disturbed) == home.weights(calm), f"killed at {kills}"
    assert disturbed.metrics["validation_accuracy"] == calm.metrics["validation_accuracy"] > 0.9


def test_a_worker_killed_while_it_publishes_leaves_nothing_half_written(home: Home) -> None:
    recipe = digits_recipe(home.upload(), epochs=2)

    async def story() -> Job:
        async with home.working():
            job_id = home.store.create_job(recipe, "digits").id
            await home.until(job_id, lambda job: job.state is State.EXPORTING)
            assert home.executor.pid is not None
            os.kill(home.executor.pid, signal.SIGKILL)
            for version in bundle.versions(home.repository, "digits"):
                bundle.verify(home.repository / "digits" / str(version))
            return await home.until(job_id, finished)

    job = asyncio.run(story())
    assert job.state is State.SUCCEEDED
    assert len(bundle.versions(home.repository, "digits")) == 1
    assert list((home.repository / ".staging").iterdir()) == []


def test_cancelling_stops_a_running_job_and_the_next_one_runs(home: Home) -> None:
    file_id = home.upload()

    async def story() -> tuple[Job, Job]:
        async with home.working():
            endless = home.store.create_job(digits_recipe(file_id, epochs=1000), "endless").id
            short = home.store.create_job(digits_recipe(file_id, epochs=1), "short").id
            await home.until(endless, lambda job: job.metrics.get("step", 0) > 0)
            home.store.request_cancel(endless)
            return await home.until(endless, finished), await home.until(short, finished)

    cancelled, done = asyncio.run(story())
    assert (cancelled.state, done.state) == (State.CANCELLED, State.SUCCEEDED)
    assert bundle.versions(home.repository, "endless") == []


def test_a_worker_that_is_stopped_gives_its_job_back_and_the_next_goes_on(home: Home) -> None:
    recipe = digits_recipe(home.upload(), epochs=60)
    job_id = home.store.create_job(recipe, "digits").id

    async def first() -> None:
        async with home.working():
            await home.until(job_id, lambda job: bool(home.store.list_checkpoints(job_id)[0]))

    async def second() -> Job:
        async with home.working():
            return await home.until(job_id, finished)

    asyncio.run(first())
    assert home.store.get_job(job_id).state is State.QUEUED
    job = asyncio.run(second())
    assert job.state is State.SUCCEEDED
    messages = [event.message for event in home.store.list_events(job_id, limit=10_000)[0]]
    assert any("going on from the checkpoint" in message for message in messages)


def test_a_job_whose_file_is_gone_or_useless_fails_in_words(home: Home) -> None:
    file_id = home.upload()
    gone = home.store.create_job(digits_recipe(file_id, epochs=1), "gone").id
    FileStore(home.folder / "files").delete(file_id)

    async def story() -> Job:
        async with home.working():
            return await home.until(gone, finished)

    job = asyncio.run(story())
    assert job.state is State.FAILED
    assert job.error is not None
    assert job.error.param == "training_file"
    assert "upload it again" in job.error.message
