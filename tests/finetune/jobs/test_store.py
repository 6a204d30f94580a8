"""The job store: transactions, states, claims, leases and pages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from finetune.jobs import schema, store
from finetune.jobs.states import IllegalTransition, State
from finetune.jobs.store import FileInUse, JobError, JobStore, LeaseLost, NotThere, Published, opened
from finetune.recipe import Coral, Recipe


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[JobStore]:
    with opened(f"sqlite:///{tmp_path}/espalier.db") as found:
        found.add_file(id="file-1", filename="x.csv", purpose="fine-tune", bytes=3, sha256="00", report="{}")
        yield found


def submit(jobs: JobStore) -> str:
    return jobs.create_job(Recipe(model="mlp", training_file="file-1"), "points").id


def test_a_job_goes_its_way_and_every_step_is_an_event(jobs: JobStore) -> None:
    job_id = submit(jobs)
    claimed = jobs.claim("w")
    assert claimed is not None
    assert (claimed.id, claimed.state, claimed.recipe.model) == (job_id, State.VALIDATING, "mlp")
    for state in (State.RUNNING, State.EXPORTING):
        jobs.transition("w", job_id, state)
    jobs.transition("w", job_id, State.SUCCEEDED, result=Published("points", 1))
    job = jobs.get_job(job_id)
    assert job.result == Published("points", 1)
    assert job.finished_at is not None
    assert job.worker_id is None
    events, more = jobs.list_events(job_id, oldest_first=True)
    assert [e.message for e in events] == ["queued", "validating", "running", "exporting", "succeeded"]
    assert [e.sequence for e in events] == [1, 2, 3, 4, 5]
    assert not more


def test_illegal_steps_change_nothing(jobs: JobStore) -> None:
    job_id = submit(jobs)
    jobs.claim("w")
    with pytest.raises(IllegalTransition, match="cannot become succeeded"):
        jobs.transition("w", job_id, State.SUCCEEDED)
    assert jobs.get_job(job_id).state is State.VALIDATING
    assert len(jobs.list_events(job_id)[0]) == 2


def test_a_failed_job_says_why(jobs: JobStore) -> None:
    job_id = submit(jobs)
    jobs.claim("w")
    jobs.transition("w", job_id, State.FAILED, error=JobError("invalid_job", "one class only"))
    assert jobs.get_job(job_id).error == JobError("invalid_job", "one class only")
    assert jobs.list_events(job_id)[0][0].message == "failed: one class only"


def test_workers_that_claim_at_once_never_get_the_same_job(jobs: JobStore, tmp_path: Path) -> None:
    submitted = [submit(jobs) for _ in range(20)]

    def claims(worker: int) -> list[str]:
        with opened(f"sqlite:///{tmp_path}/espalier.db") as own:
            found = []
            while (job := own.claim(f"w{worker}")) is not None:
                found.append(job.id)
            return found

    with ThreadPoolExecutor(4) as pool:
        found = [job_id for claimed in pool.map(claims, range(4)) for job_id in claimed]
    assert sorted(found) == sorted(submitted)


def test_the_oldest_job_is_first(jobs: JobStore) -> None:
    submitted = [submit(jobs) for _ in range(3)]
    assert [job.id for _ in range(3) if (job := jobs.claim("w"))] == submitted


def test_a_worker_that_does_not_renew_loses_its_job(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submit(jobs)
    jobs.claim("dead")
    assert jobs.claim("other") is None
    now = time.time()
    monkeypatch.setattr(store.time, "time", lambda: now + store.LEASE_SECONDS + 1)
    taken = jobs.claim("other")
    assert taken is not None
    assert taken.id == job_id
    for call in (
        lambda: jobs.renew("dead", job_id),
        lambda: jobs.transition("dead", job_id, State.RUNNING),
        lambda: jobs.cancel_requested("dead", job_id),
        lambda: jobs.add_checkpoint("dead", job_id, 1, Path("x"), {}),
    ):
        with pytest.raises(LeaseLost):
            call()
    jobs.renew("other", job_id)


def test_a_job_that_kills_its_workers_is_given_up_unless_it_gets_on(jobs: JobStore) -> None:
    job_id = submit(jobs)
    for attempt in range(store.MOST_ATTEMPTS + 3):
        assert jobs.claim("w") is not None
        if attempt == 2:
            jobs.add_checkpoint("w", job_id, 10, Path("step-10"), {"loss": 1.0})
        assert jobs.release_worker("w", "it died") == [job_id]
    assert jobs.claim("w") is None
    error = jobs.get_job(job_id).error
    assert error is not None
    assert "memory" in error.message


def test_giving_back_is_no_failed_attempt(jobs: JobStore) -> None:
    job_id = submit(jobs)
    for _ in range(3 * store.MOST_ATTEMPTS):
        assert jobs.claim("w") is not None
        jobs.give_back("w", job_id)
    assert jobs.get_job(job_id).state is State.QUEUED


def test_cancelling(jobs: JobStore) -> None:
    waiting, running = submit(jobs), submit(jobs)
    jobs.claim("w")
    assert jobs.request_cancel(running).state is State.CANCELLED
    assert not jobs.cancel_requested("w", waiting)
    assert jobs.request_cancel(waiting).cancel_requested
    assert jobs.cancel_requested("w", waiting)
    jobs.release_worker("w", "it died")
    assert jobs.get_job(waiting).state is State.CANCELLED
    with pytest.raises(IllegalTransition, match="already"):
        jobs.request_cancel(waiting)


def test_the_file_of_a_domain_to_adapt_to_is_kept_as_well(jobs: JobStore) -> None:
    for file_id in ("file-ink", "file-pencil"):
        jobs.add_file(id=file_id, filename="a.csv", purpose="fine-tune", bytes=1, sha256="", report="{}")
    recipe = Recipe(model="mlp", training_file="file-ink", terms=(Coral(file="file-pencil"),))
    job_id = jobs.create_job(recipe, "digits").id
    with pytest.raises(FileInUse, match=job_id):
        jobs.delete_file("file-pencil")
    jobs.request_cancel(job_id)
    jobs.delete_file("file-pencil")
    with pytest.raises(NotThere, match="file-pencil"):
        jobs.create_job(recipe, "digits")


def test_a_file_is_kept_while_a_job_needs_it(jobs: JobStore) -> None:
    job_id = submit(jobs)
    with pytest.raises(FileInUse, match=job_id):
        jobs.delete_file("file-1")
    jobs.request_cancel(job_id)
    jobs.delete_file("file-1")
    with pytest.raises(NotThere):
        jobs.get_file("file-1")
    with pytest.raises(NotThere):
        submit(jobs)


def test_pages_go_through_everything_once(jobs: JobStore) -> None:
    submitted = [submit(jobs) for _ in range(7)]
    found: list[str] = []
    more, after = True, None
    while more:
        page, more = jobs.list_jobs(after=after, limit=3)
        found += [job.id for job in page]
        after = found[-1]
    assert found == submitted[::-1]
    with pytest.raises(NotThere):
        jobs.list_jobs(after="ftjob-none")


def test_events_go_on_behind_the_one_that_is_named(jobs: JobStore) -> None:
    job_id = submit(jobs)
    for i in range(5):
        jobs.add_event(job_id, f"event {i}")
    first, more = jobs.list_events(job_id, limit=2, oldest_first=True)
    assert more
    rest, more = jobs.list_events(job_id, after=first[-1].id, oldest_first=True)
    assert [e.message for e in first + rest] == ["queued", *(f"event {i}" for i in range(5))]
    assert not more
    for wrong in ("ftevent-other-1", "x", first[0].id + "x"):
        with pytest.raises(NotThere):
            jobs.list_events(job_id, after=wrong)


def test_metrics_are_an_event_and_the_jobs_newest(jobs: JobStore) -> None:
    job_id = submit(jobs)
    jobs.add_metrics(job_id, 5, {"train_loss": 0.5, "total_steps": 10.0, "eta_seconds": 100.0})
    jobs.add_metrics(job_id, 6, {"validation_loss": 0.7})
    job = jobs.get_job(job_id)
    assert job.metrics == {"step": 6, "train_loss": 0.5, "total_steps": 10, "eta_seconds": 100, "validation_loss": 0.7}
    assert job.estimated_finish is not None
    assert jobs.list_events(job_id)[0][1].message == "step 5/10: training loss 0.5000"


def test_checkpoints_of_a_repeated_stretch_replace_those_before(jobs: JobStore) -> None:
    job_id = submit(jobs)
    jobs.claim("w")
    for step in (10, 20, 30, 20):
        jobs.add_checkpoint("w", job_id, step, Path(f"step-{step}"), {"loss": float(step)})
    assert [c.step for c in jobs.list_checkpoints(job_id)[0]] == [20, 10]


def test_the_tables_are_those_that_the_migrations_make(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with opened(f"sqlite:///{tmp_path}/a.db") as first:
        first.add_file(id="file-1", filename="x", purpose="fine-tune", bytes=0, sha256="", report="{}")
    with opened(f"sqlite:///{tmp_path}/a.db") as again:
        assert again.get_file("file-1").filename == "x"
        with again.engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
            assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == schema.REVISION
            assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
