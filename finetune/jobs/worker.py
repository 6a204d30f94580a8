"""The worker process: takes jobs from the store, one at a time, and runs them.

    python -m finetune.jobs.worker --database URL --home FOLDER

It runs at a lower priority than the server beside it. Killed, it loses nothing but the steps since the last
checkpoint; asked to stop (SIGTERM), it gives its job back to the queue within a step.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from export.staging import sweep
from finetune.data.files import FileStore
from finetune.jobs.states import State
from finetune.jobs.store import Job, JobError, JobStore, LeaseLost, NotThere, Published
from finetune.run_request import Cancelled, FileRef, JobFailed, Reporter, RunRequest, Stage

if TYPE_CHECKING:
    from export.bundle import Manifest

log = logging.getLogger("espalier.worker")

POLL_SECONDS = 0.3
BEAT_SECONDS = 3.0
# How old the answer to "is it cancelled?" may be.
CANCEL_SECONDS = 0.05
NICENESS = 5

Run = Callable[[RunRequest, Reporter], "Manifest"]


class JobReporter:
    """Writes what a run reports into the job store. `stopping`: the process was asked to stop; `lost`: the job is
    somebody else's by now."""

    def __init__(self, store: JobStore, worker_id: str, job_id: str, stopping: threading.Event) -> None:
        self.store, self.worker_id, self.job_id = store, worker_id, job_id
        self.stopping = stopping
        self.lost = threading.Event()
        self.asked = 0.0
        self.cancel = False

    def state(self, stage: Stage) -> None:
        if stage != "validating":  # a claimed job is validating already
            self.store.transition(self.worker_id, self.job_id, State(stage))

    def event(
        self, message: str, *, level: str = "info", type: str = "message", data: dict[str, Any] | None = None
    ) -> None:
        self.store.add_event(self.job_id, message, level=level, type=type, data=data)

    def metrics(self, step: int, **values: float | None) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        self.store.add_metrics(self.job_id, step, known)

    def checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        self.store.add_checkpoint(self.worker_id, self.job_id, step, path, metrics)

    def cancelled(self) -> bool:
        if self.stopping.is_set() or self.lost.is_set():
            return True
        if time.monotonic() - self.asked >= CANCEL_SECONDS:
            self.cancel = self.store.cancel_requested(self.worker_id, self.job_id)
            self.asked = time.monotonic()
        return self.cancel

    def beat(self, done: threading.Event) -> None:
        """Renew the lease until `done`; runs in a thread of its own."""
        while not done.wait(BEAT_SECONDS):
            try:
                self.store.renew(self.worker_id, self.job_id)
            except LeaseLost:
                self.lost.set()
                return


def work(
    store: JobStore,
    home: Path,
    repository: Path,
    worker_id: str,
    backbones: dict[str, str],
    run: Run,
    stopping: threading.Event,
) -> None:
    """Take jobs until `stopping`."""
    while not stopping.is_set():
        job = store.claim(worker_id)
        if job is None:
            stopping.wait(POLL_SECONDS)
            continue
        work_on(job, store, home, repository, worker_id, backbones, run, stopping)


def work_on(
    job: Job,
    store: JobStore,
    home: Path,
    repository: Path,
    worker_id: str,
    backbones: dict[str, str],
    run: Run,
    stopping: threading.Event,
) -> None:
    """Run one job to its end, whatever that is."""
    reporter = JobReporter(store, worker_id, job.id, stopping)
    folder = home / "jobs" / job.id
    folder.mkdir(parents=True, exist_ok=True)
    done = threading.Event()
    beat = threading.Thread(target=reporter.beat, args=(done,), daemon=True)
    beat.start()

    def end(state: State, **fields: Any) -> None:
        store.transition(worker_id, job.id, state, **fields)

    try:
        try:
            manifest = run(request_of(job, store, home, repository, folder, backbones), reporter)
            if store.get_job(job.id).state is State.VALIDATING:  # it had been published before its worker died
                reporter.state("running")
            if store.get_job(job.id).state is State.RUNNING:
                reporter.state("exporting")
            end(State.SUCCEEDED, result=Published(manifest.name, manifest.version))
        except Cancelled:
            if reporter.lost.is_set():
                raise LeaseLost(job.id) from None
            if stopping.is_set():
                store.give_back(worker_id, job.id)
            else:
                end(State.CANCELLED)
        except LeaseLost:
            raise
        except JobFailed as error:
            end(State.FAILED, error=JobError("invalid_job", str(error)))
        except NotThere as error:
            message = f"{error}: it was deleted before the job could read it; upload it again and submit the job anew"
            end(State.FAILED, error=JobError("file_deleted", message, "training_file"))
        except Exception as error:  # a defect of ours or of a library: the job ends, the worker goes on
            (folder / "error.log").write_text(traceback.format_exc())
            log.exception("job %s failed", job.id)
            message = f"{type(error).__name__}: {error} (an internal error; the traceback is in {folder / 'error.log'})"
            end(State.FAILED, error=JobError("internal_error", message))
    except LeaseLost:
        log.warning("job %s is no longer this worker's", job.id)
    finally:
        done.set()
        beat.join()


def request_of(
    job: Job, store: JobStore, home: Path, repository: Path, folder: Path, backbones: dict[str, str]
) -> RunRequest:
    """Raises NotThere when a file of the job is gone."""
    files = FileStore(home / "files")

    def reference(file_id: str) -> FileRef:
        record = store.get_file(file_id)
        path = files.path(file_id)
        if not path.is_file():
            raise NotThere(f"no content of file {file_id!r}")
        return FileRef(path=path, filename=record.filename, sha256=record.sha256, id=file_id)

    return RunRequest(
        recipe=job.recipe,
        training=reference(job.training_file),
        validation=reference(job.validation_file) if job.validation_file else None,
        unlabelled={file_id: reference(file_id) for file_id in job.recipe.unlabelled_files()},
        folder=folder,
        repository=repository,
        name=job.name,
        job_id=job.id,
        backbones=backbones,
    )


def worker_id_of(home: Path) -> str:
    """The same for every worker process of one home: only one of them lives at a time, which a lock sees to."""
    digest = hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:12]
    return f"{socket.gethostname()[:64]}-{digest}"


def hold_lock(path: Path, stopping: threading.Event) -> int | None:
    """Wait until no other process holds the lock; its descriptor, or None when it is time to stop."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    while not stopping.is_set():
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        stopping.wait(0.2)
    return None


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the server is gone, however it went (Linux)."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != parent:  # it went in between
            os.kill(os.getpid(), signal.SIGTERM)


def run_job(request: RunRequest, reporter: Reporter) -> Manifest:
    """Imports torch with the first job: an idle worker is small."""
    from finetune.run import run

    return run(request, reporter)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.jobs.worker", description="Runs fine-tuning jobs.")
    parser.add_argument("--database", required=True, help="SQLAlchemy URL of the job store")
    parser.add_argument("--home", required=True, type=Path, help="folder of files and jobs")
    parser.add_argument("--repository", required=True, type=Path, help="folder of published models")
    parser.add_argument("--backbones", default="{}", help="the operator's own weights, name → place, as JSON")
    parser.add_argument("--after", default="the worker process died", help="why the one before this is no more")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("espalier").setLevel(logging.INFO)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the server, which stops its worker in order
    die_with_parent()
    os.nice(NICENESS)
    if hold_lock(given.home / "worker.lock", stopping) is None:
        return
    sweep(given.repository)
    store = JobStore(given.database)
    worker_id = worker_id_of(given.home)
    for job_id in store.release_worker(worker_id, given.after):
        log.info("job %s is taken up again", job_id)
    backbones = msgspec.json.decode(given.backbones, type=dict[str, str])
    work(store, given.home, given.repository, worker_id, backbones, run_job, stopping)
    store.close()


if __name__ == "__main__":
    main()
