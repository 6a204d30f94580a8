"""The job store: files, jobs, events and checkpoints in a database that the server and its workers share.

SQLite by default, in WAL mode so that readers never wait for a writer, and synchronous=FULL: what was answered with
200 is still there after a power cut. Any other database goes by its SQLAlchemy URL. Every function is one transaction.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row, event, func, select

from finetune.jobs import schema
from finetune.jobs.states import ACTIVE, FINISHED, IllegalTransition, State, check
from finetune.recipe import Recipe

LEASE_SECONDS = 10.0
# A job whose worker dies this often without a new checkpoint in between is given up.
MOST_ATTEMPTS = 5


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An uploaded file. `report` is finetune.data.validation.Report as JSON."""

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: float
    status: str
    report: str | None


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed: a word for programs, a sentence for people, the recipe's field if one is to blame."""

    code: str
    message: str
    param: str | None = None


class Published(msgspec.Struct, frozen=True):
    name: str
    version: int


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A fine-tuning job. Times are Unix seconds. `metrics` are the newest of each name."""

    id: str
    state: State
    name: str
    recipe: Recipe
    training_file: str
    validation_file: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    estimated_finish: float | None
    worker_id: str | None
    lease_expires_at: float | None
    attempts_without_progress: int
    cancel_requested: bool
    events: int
    trained_samples: int
    trained_tokens: int | None
    metrics: dict[str, float]
    error: JobError | None
    result: Published | None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """`sequence` counts the events of a job from 1."""

    id: str
    job_id: str
    sequence: int
    created_at: float
    level: str
    type: str
    message: str
    data: dict[str, Any] | None


class CheckpointRecord(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    job_id: str
    step: int
    created_at: float
    path: str
    metrics: dict[str, float]


class NotThere(LookupError):
    """No file or job of that id."""


class FileInUse(Exception):
    """The file is needed by a job that is not finished."""


class LeaseLost(Exception):
    """The job belongs to another worker by now, or to none."""


class JobStore:
    """One database. Threads may share it; processes open one each."""

    def __init__(self, url: str) -> None:
        """Opens the database, makes or upgrades its tables when they are not at the newest revision."""
        address = sa.make_url(url)
        self.sqlite = address.get_backend_name() == "sqlite"
        if self.sqlite and address.database:
            Path(address.database).parent.mkdir(parents=True, exist_ok=True)
        self.engine = sa.create_engine(address)
        if self.sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            # A transaction that reads before it writes must hold the write lock from its beginning.
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        self.reading = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._migrate()

    def close(self) -> None:
        self.engine.dispose()

    # Files

    def add_file(self, *, id: str, filename: str, purpose: str, bytes: int, sha256: str, report: str) -> FileRecord:
        record = FileRecord(
            id=id,
            filename=filename,
            purpose=purpose,
            bytes=bytes,
            sha256=sha256,
            created_at=time.time(),
            status="processed",
            report=report,
        )
        with self.engine.begin() as connection:
            connection.execute(schema.files.insert().values(**msgspec.structs.asdict(record)))
        return record

    def get_file(self, file_id: str) -> FileRecord:
        """Raises NotThere."""
        with self.reading.connect() as connection:
            row = connection.execute(select(schema.files).where(schema.files.c.id == file_id)).one_or_none()
        if row is None:
            raise NotThere(f"no file {file_id!r}")
        return FileRecord(**row._mapping)

    def list_files(
        self, *, purpose: str | None = None, after: str | None = None, limit: int = 10_000, newest_first: bool = True
    ) -> tuple[list[FileRecord], bool]:
        """A page of files behind the one with id `after`, and whether there are more. Raises NotThere."""
        table = schema.files
        query = select(table)
        if purpose is not None:
            query = query.where(table.c.purpose == purpose)
        with self.reading.connect() as connection:
            rows, more = _page(connection, query, table, after, limit, newest_first)
        return [FileRecord(**row._mapping) for row in rows], more

    def delete_file(self, file_id: str) -> None:
        """Raises NotThere, or FileInUse naming the job that needs it."""
        jobs = schema.jobs
        with self.engine.begin() as connection:
            waiting = select(jobs.c.id, jobs.c.state, jobs.c.recipe).where(jobs.c.state.not_in([*FINISHED]))
            for user in connection.execute(waiting):
                if file_id in _files_of(msgspec.json.decode(user.recipe, type=Recipe)):
                    raise FileInUse(
                        f"file {file_id} is needed by job {user.id}, which is {user.state}; cancel it first"
                    )
            if not connection.execute(schema.files.delete().where(schema.files.c.id == file_id)).rowcount:
                raise NotThere(f"no file {file_id!r}")

    # Jobs

    def create_job(self, recipe: Recipe, name: str) -> Job:
        """Queue a job. Raises NotThere when a file that the recipe names is gone."""
        job_id = f"ftjob-{uuid4().hex[:24]}"
        with self.engine.begin() as connection:
            for file_id in _files_of(recipe):
                found = select(schema.files.c.id).where(schema.files.c.id == file_id)
                if connection.execute(found).one_or_none() is None:
                    raise NotThere(f"no file {file_id!r}")
            connection.execute(
                schema.jobs.insert().values(
                    id=job_id,
                    state=State.QUEUED,
                    name=name,
                    recipe=_json(recipe),
                    training_file=recipe.training_file,
                    validation_file=recipe.validation_file,
                    created_at=time.time(),
                    attempts_without_progress=0,
                    cancel_requested=False,
                    events=0,
                    trained_samples=0,
                    metrics="{}",
                )
            )
            _add_event(connection, job_id, "queued", type="state", data={"state": State.QUEUED})
            return _job(connection, job_id)

    def get_job(self, job_id: str) -> Job:
        """Raises NotThere."""
        with self.reading.connect() as connection:
            return _job(connection, job_id)

    def list_jobs(self, *, after: str | None = None, limit: int = 20) -> tuple[list[Job], bool]:
        """A page of jobs, newest first, behind the one with id `after`, and whether there are more. Raises NotThere."""
        with self.reading.connect() as connection:
            rows, more = _page(connection, select(schema.jobs), schema.jobs, after, limit, True)
        return [_to_job(row) for row in rows], more

    def request_cancel(self, job_id: str) -> Job:
        """A queued job is cancelled at once, a running one within its next step. Raises NotThere, IllegalTransition."""
        with self.engine.begin() as connection:
            job = _job(connection, job_id)
            if job.state in FINISHED:
                raise IllegalTransition(f"job {job_id} is {job.state} already")
            if job.state is State.QUEUED:
                _move(connection, job, State.CANCELLED)
            elif not job.cancel_requested:
                _update(connection, job_id, cancel_requested=True)
                _add_event(connection, job_id, "cancellation requested")
            return _job(connection, job_id)

    def claim(self, worker_id: str) -> Job | None:
        """Take the oldest job that waits, or whose worker has not renewed its lease; None when there is none.

        A job that was claimed five times without getting anywhere is failed instead, in words.
        """
        while True:
            with self.engine.begin() as connection:
                self._requeue(connection, schema.jobs.c.lease_expires_at < time.time(), "its worker does not answer")
                waiting = select(schema.jobs.c.id).where(schema.jobs.c.state == State.QUEUED)
                if connection.dialect.name == "postgresql":
                    waiting = waiting.with_for_update(skip_locked=True)
                found = connection.execute(waiting.order_by(schema.jobs.c.created_at).limit(1)).one_or_none()
                if found is None:
                    return None
                job = _job(connection, found.id)
                if job.attempts_without_progress >= MOST_ATTEMPTS:
                    message = (
                        f"the worker process died {MOST_ATTEMPTS} times without reaching a new checkpoint; its memory "
                        "was probably not enough: lower batch_size, image_size or max_length (the worker's log may "
                        "say more)"
                    )
                    _move(connection, job, State.FAILED, error=JobError("worker_died", message))
                    continue
                _move(
                    connection,
                    job,
                    State.VALIDATING,
                    worker_id=worker_id,
                    lease_expires_at=time.time() + LEASE_SECONDS,
                    attempts_without_progress=job.attempts_without_progress + 1,
                    started_at=job.started_at or time.time(),
                )
                return _job(connection, job.id)

    def renew(self, worker_id: str, job_id: str) -> None:
        """Hold a job for another ten seconds. Raises LeaseLost."""
        with self.engine.begin() as connection:
            _owned(connection, worker_id, job_id)
            _update(connection, job_id, lease_expires_at=time.time() + LEASE_SECONDS)

    def release_worker(self, worker_id: str, reason: str) -> list[str]:
        """Put the jobs of a worker that is no more back into the queue; their ids."""
        with self.engine.begin() as connection:
            return self._requeue(connection, schema.jobs.c.worker_id == worker_id, reason)

    def give_back(self, worker_id: str, job_id: str) -> None:
        """A worker that is asked to stop returns its job: no failed attempt. Raises LeaseLost."""
        with self.engine.begin() as connection:
            job = _owned(connection, worker_id, job_id)
            attempts = max(job.attempts_without_progress - 1, 0)
            _move(connection, job, State.QUEUED, attempts_without_progress=attempts)

    def transition(
        self,
        worker_id: str,
        job_id: str,
        state: State,
        *,
        error: JobError | None = None,
        result: Published | None = None,
    ) -> None:
        """Raises LeaseLost, IllegalTransition."""
        with self.engine.begin() as connection:
            job = _owned(connection, worker_id, job_id)
            fields: dict[str, Any] = {"error": error} if error else {}
            if result:
                fields["result"] = result
            _move(connection, job, state, **fields)

    def cancel_requested(self, worker_id: str, job_id: str) -> bool:
        """Whether somebody wants the job to stop. Raises LeaseLost."""
        jobs = schema.jobs
        query = select(jobs.c.cancel_requested, jobs.c.worker_id).where(jobs.c.id == job_id)
        with self.reading.connect() as connection:
            row = connection.execute(query).one()
        if row.worker_id != worker_id:
            raise LeaseLost(job_id)
        return bool(row.cancel_requested)

    def counts_by_state(self) -> dict[str, int]:
        """Jobs in every state, 0 where there are none."""
        query = select(schema.jobs.c.state, func.count()).group_by(schema.jobs.c.state)
        with self.reading.connect() as connection:
            found = {row[0]: row[1] for row in connection.execute(query)}
        return {state.value: found.get(state.value, 0) for state in State}

    def running_metrics(self) -> dict[tuple[str, str], dict[str, float]]:
        """The newest metrics of every running job, by its id and the name it will publish."""
        query = select(schema.jobs.c.id, schema.jobs.c.name, schema.jobs.c.metrics).where(
            schema.jobs.c.state == State.RUNNING
        )
        with self.reading.connect() as connection:
            return {(row.id, row.name): msgspec.json.decode(row.metrics) for row in connection.execute(query)}

    def finished_since(self, moment: float) -> list[Job]:
        """Jobs that ended after this moment, in the order in which they did."""
        query = select(schema.jobs).where(schema.jobs.c.finished_at > moment).order_by(schema.jobs.c.finished_at)
        with self.reading.connect() as connection:
            return [_to_job(row) for row in connection.execute(query)]

    def stages(self, job_id: str) -> list[tuple[State, float]]:
        """The states that a job has been in, in their order, and when it came into each."""
        events = schema.events.c
        query = select(events.data, events.created_at).where(events.job_id == job_id, events.type == "state")
        with self.reading.connect() as connection:
            rows = connection.execute(query.order_by(events.sequence)).all()
        return [(State(msgspec.json.decode(row.data)["state"]), row.created_at) for row in rows]

    # What happens in a job

    def add_event(
        self,
        job_id: str,
        message: str,
        *,
        level: str = "info",
        type: str = "message",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        with self.engine.begin() as connection:
            _add_event(connection, job_id, message, level=level, type=type, data=data)

    def add_metrics(self, job_id: str, step: int, values: Mapping[str, float]) -> None:
        """An event of type "metrics", and the job's newest metrics; `eta_seconds` becomes its estimated finish."""
        with self.engine.begin() as connection:
            found = connection.execute(select(schema.jobs.c.metrics).where(schema.jobs.c.id == job_id)).scalar_one()
            metrics = {**msgspec.json.decode(found), "step": step, **values}
            eta = values.get("eta_seconds")
            finish = {"estimated_finish": time.time() + eta} if eta is not None else {}
            _update(connection, job_id, metrics=metrics, **finish)
            loss = values.get("train_loss")
            words = f"step {step}" + (f"/{values['total_steps']:.0f}" if "total_steps" in values else "")
            words += f": training loss {loss:.4f}" if loss is not None else ""
            _add_event(connection, job_id, words, type="metrics", data={"step": step, **values})

    def list_events(
        self, job_id: str, *, after: str | None = None, limit: int = 20, oldest_first: bool = False
    ) -> tuple[list[Event], bool]:
        """A page of events behind the one with id `after`, newest first as OpenAI has it, and whether there are more.

        Raises NotThere.
        """
        table = schema.events
        query = select(table).where(table.c.job_id == job_id)
        if after is not None:
            sequence = sequence_of(job_id, after)
            query = query.where(table.c.sequence > sequence if oldest_first else table.c.sequence < sequence)
        order = table.c.sequence.asc() if oldest_first else table.c.sequence.desc()
        with self.reading.connect() as connection:
            if not connection.execute(select(schema.jobs.c.id).where(schema.jobs.c.id == job_id)).one_or_none():
                raise NotThere(f"no job {job_id!r}")
            rows = connection.execute(query.order_by(order).limit(limit + 1)).all()
        return [_to_event(row) for row in rows[:limit]], len(rows) > limit

    def add_checkpoint(
        self, worker_id: str, job_id: str, step: int, path: Path, metrics: Mapping[str, float]
    ) -> CheckpointRecord:
        """Record progress: the job may lose its worker again. Raises LeaseLost."""
        record = CheckpointRecord(
            id=f"ftckpt-{uuid4().hex[:24]}",
            job_id=job_id,
            step=step,
            created_at=time.time(),
            path=str(path),
            metrics=dict(metrics),
        )
        with self.engine.begin() as connection:
            _owned(connection, worker_id, job_id)
            table = schema.checkpoints
            connection.execute(table.delete().where(table.c.job_id == job_id, table.c.step >= step))
            connection.execute(table.insert().values(**{**msgspec.structs.asdict(record), "metrics": _json(metrics)}))
            _update(connection, job_id, attempts_without_progress=0)
        return record

    def list_checkpoints(
        self, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> tuple[list[CheckpointRecord], bool]:
        """A page of checkpoints, newest first, and whether there are more. Raises NotThere."""
        table = schema.checkpoints
        query = select(table).where(table.c.job_id == job_id)
        with self.reading.connect() as connection:
            _job(connection, job_id)
            if after is not None:
                last = connection.execute(select(table.c.step).where(table.c.id == after)).scalar_one_or_none()
                if last is None:
                    raise NotThere(f"no checkpoint {after!r}")
                query = query.where(table.c.step < last)
            rows = connection.execute(query.order_by(table.c.step.desc()).limit(limit + 1)).all()
        records = [CheckpointRecord(**{**row._mapping, "metrics": msgspec.json.decode(row.metrics)}) for row in rows]
        return records[:limit], len(rows) > limit

    def _requeue(self, connection: Connection, condition: sa.ColumnElement[bool], reason: str) -> list[str]:
        jobs = schema.jobs
        lost = connection.execute(select(jobs.c.id).where(jobs.c.state.in_([*ACTIVE]), condition)).scalars().all()
        for job_id in lost:
            _add_event(connection, job_id, f"{reason}; the job goes on from its last checkpoint", level="warn")
            job = _job(connection, job_id)
            _move(connection, job, State.CANCELLED if job.cancel_requested else State.QUEUED)
        return list(lost)

    def _migrate(self) -> None:
        """Alembic is imported only when there is something to do: it takes longer than everything else here."""
        try:
            with self.reading.connect() as connection:
                if connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == schema.REVISION:
                    return
        except sa.exc.DBAPIError:
            pass  # no tables yet
        from alembic import command
        from alembic.config import Config

        with self.engine.begin() as connection:
            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def event_id(job_id: str, sequence: int) -> str:
    """Ids of events say where they belong, so that a client can go on from one."""
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{sequence}"


def sequence_of(job_id: str, given: str) -> int:
    """The sequence in an event's id. Raises NotThere for the id of no event of this job."""
    stem, _, sequence = given.rpartition("-")
    if stem != event_id(job_id, 0).rpartition("-")[0] or not sequence.isdecimal() or len(sequence) > 9:
        raise NotThere(f"no event {given!r}")
    return int(sequence)


def _files_of(recipe: Recipe) -> list[str]:
    """Ids of all files that a job of this recipe reads."""
    named = (recipe.training_file, recipe.validation_file, *recipe.unlabelled_files())
    return [file_id for file_id in named if file_id is not None]


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by us, not guessed by the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _job(connection: Connection, job_id: str) -> Job:
    row = connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise NotThere(f"no job {job_id!r}")
    return _to_job(row)


def _to_job(row: Row[Any]) -> Job:
    fields = dict(row._mapping)
    for name, kind in (("recipe", Recipe), ("metrics", dict[str, float]), ("error", JobError), ("result", Published)):
        if fields[name] is not None:
            fields[name] = msgspec.json.decode(fields[name], type=kind)
    fields["state"] = State(fields["state"])
    return Job(**fields)


def _to_event(row: Row[Any]) -> Event:
    data = None if row.data is None else msgspec.json.decode(row.data)
    return Event(**{**row._mapping, "id": event_id(row.job_id, row.sequence), "data": data})


def _owned(connection: Connection, worker_id: str, job_id: str) -> Job:
    job = _job(connection, job_id)
    if job.worker_id != worker_id or job.state not in ACTIVE:
        raise LeaseLost(job_id)
    return job


def _update(connection: Connection, job_id: str, **fields: Any) -> None:
    for name in ("error", "result", "metrics"):
        if name in fields:
            fields[name] = _json(fields[name])
    connection.execute(schema.jobs.update().where(schema.jobs.c.id == job_id).values(**fields))


def _move(connection: Connection, job: Job, state: State, **fields: Any) -> None:
    """Change the state, and say so in an event. A job that is no longer worked on belongs to nobody."""
    check(job.id, job.state, state)
    if state not in ACTIVE:
        fields |= {"worker_id": None, "lease_expires_at": None, "estimated_finish": None}
    if state in FINISHED:
        fields["finished_at"] = time.time()
    error: JobError | None = fields.get("error")
    _update(connection, job.id, state=state, **fields)
    message = f"{state}: {error.message}" if error else str(state)
    _add_event(connection, job.id, message, level="error" if error else "info", type="state", data={"state": state})


def _add_event(
    connection: Connection,
    job_id: str,
    message: str,
    *,
    level: str = "info",
    type: str = "message",
    data: Mapping[str, Any] | None = None,
) -> None:
    jobs = schema.jobs
    counted = jobs.update().where(jobs.c.id == job_id).values(events=jobs.c.events + 1).returning(jobs.c.events)
    sequence = connection.execute(counted).scalar_one()
    connection.execute(
        schema.events.insert().values(
            job_id=job_id,
            sequence=sequence,
            created_at=time.time(),
            level=level,
            type=type,
            message=message,
            data=None if data is None else _json(data),
        )
    )


def _page(
    connection: Connection, query: sa.Select[Any], table: sa.Table, after: str | None, limit: int, newest_first: bool
) -> tuple[Sequence[Row[Any]], bool]:
    """Rows behind the one with id `after`, by age and id, and whether there are more."""
    key = sa.tuple_(table.c.created_at, table.c.id)
    if after is not None:
        last = connection.execute(select(table.c.created_at).where(table.c.id == after)).scalar_one_or_none()
        if last is None:
            raise NotThere(f"nothing with id {after!r}")
        # A cursor's row may carry the same time as others; the id decides then.
        query = query.where(key < (last, after) if newest_first else key > (last, after))
    order = [column.desc() if newest_first else column.asc() for column in (table.c.created_at, table.c.id)]
    rows = connection.execute(query.order_by(*order).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


@contextmanager
def opened(url: str) -> Iterator[JobStore]:
    """A store for the length of a `with`."""
    store = JobStore(url)
    try:
        yield store
    finally:
        store.close()
