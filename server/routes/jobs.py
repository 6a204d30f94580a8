"""OpenAI's fine-tuning API: /v1/fine_tuning/jobs, their events (also as a stream) and their checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, get, post
from litestar.datastructures import State as AppState
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from litestar.response import Stream

from export.bundle import DamagedBundle
from export.storage import pull
from finetune.admission import Refused, UnknownModel, Unusable, admit
from finetune.data.validation import Report
from finetune.jobs.states import FINISHED, IllegalTransition, State
from finetune.jobs.store import CheckpointRecord, Event, Job, JobError, JobStore, NotThere, Published
from finetune.recipe import Recipe
from models.spec import ModelSpec
from server.errors import ApiError

# OpenAI's status for each of our states; `state` says ours.
STATUS = {State.VALIDATING: "validating_files", State.EXPORTING: "running"}
FOLLOW_SECONDS = 0.25
PING_SECONDS = 15.0

Limit = Annotated[int, QueryParameter(ge=1, le=1000)]


class JobObject(msgspec.Struct, kw_only=True):
    """OpenAI's fine_tuning.job, and: `state` (one of ours), `recipe` (as handed in), `metrics` (the newest),
    `result` (name and version published). Times are Unix seconds."""

    id: str
    created_at: int
    finished_at: int | None
    started_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    status: str
    state: State
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    seed: int | None
    trained_tokens: int | None
    error: JobError | None
    metadata: dict[str, str] | None
    recipe: Recipe
    metrics: dict[str, float]
    result: Published | None
    integrations: list[dict[str, Any]] = []
    result_files: list[str] = []
    organization_id: str = "espalier"
    object: str = "fine_tuning.job"


class JobList(msgspec.Struct, kw_only=True):
    data: list[JobObject]
    has_more: bool
    object: str = "list"


class EventObject(msgspec.Struct, kw_only=True):
    """OpenAI's fine_tuning.job.event. `type`: "message", "metrics", "state", "evaluation", ..."""

    id: str
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None
    object: str = "fine_tuning.job.event"


class EventList(msgspec.Struct, kw_only=True):
    data: list[EventObject]
    has_more: bool
    object: str = "list"


class CheckpointObject(msgspec.Struct, kw_only=True):
    id: str
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]
    object: str = "fine_tuning.job.checkpoint"


class CheckpointList(msgspec.Struct, kw_only=True):
    data: list[CheckpointObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


def job_object(job: Job) -> JobObject:
    recipe = job.recipe
    hyperparameters = msgspec.to_builtins(recipe.training_hyperparameters())
    return JobObject(
        id=job.id,
        created_at=int(job.created_at),
        finished_at=seconds(job.finished_at),
        started_at=seconds(job.started_at),
        estimated_finish=seconds(job.estimated_finish),
        model=recipe.model.architecture if isinstance(recipe.model, ModelSpec) else recipe.model,
        fine_tuned_model=f"{job.result.name}:{job.result.version}" if job.result else None,
        status=STATUS.get(job.state, job.state.value),
        state=job.state,
        training_file=job.training_file,
        validation_file=job.validation_file,
        hyperparameters=hyperparameters,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        seed=recipe.seed,
        trained_tokens=job.trained_tokens,
        error=job.error,
        metadata=recipe.metadata,
        recipe=recipe,
        metrics=job.metrics,
        result=job.result,
    )


def seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def event_object(event: Event) -> EventObject:
    return EventObject(
        id=event.id,
        created_at=int(event.created_at),
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
    )


def checkpoint_object(record: CheckpointRecord) -> CheckpointObject:
    return CheckpointObject(
        id=record.id,
        created_at=int(record.created_at),
        fine_tuning_job_id=record.job_id,
        fine_tuned_model_checkpoint=f"{record.job_id}:step-{record.step}",
        step_number=record.step,
        metrics=record.metrics,
    )


def not_found(error: NotThere) -> ApiError:
    return ApiError(404, str(error), param="fine_tuning_job_id", code="job_not_found")


@post("/v1/fine_tuning/jobs", status_code=200, sync_to_thread=True)
def create_job(state: AppState, data: JSONBody[Recipe]) -> JobObject:
    """Queue a fine-tuning job. The body is a Recipe; what can be known to be wrong with it is said at once."""
    store: JobStore = state.store
    report = report_of(store, data.training_file, "training_file")
    validation = report_of(store, data.validation_file, "validation_file") if data.validation_file is not None else None
    unlabelled = {file_id: report_of(store, file_id, "terms") for file_id in data.unlabelled_files()}
    settings = state.settings
    try:
        pull(settings.repository, data.begins_with())
    except (OSError, DamagedBundle) as error:
        raise ApiError(503, f"the repository: {error}", code="repository_unavailable") from error
    try:
        name = admit(
            data,
            report=report,
            validation=validation,
            unlabelled=unlabelled,
            backbones=settings.backbones,
            repository=settings.repository,
            allow_hub=settings.allow_hub,
        )
    except UnknownModel as error:
        raise ApiError(404, str(error), param=error.param, code="model_not_found") from error
    except Unusable as error:
        filename = store.get_file(data.training_file).filename
        words = f"training_file: {filename}: {error}"
        raise ApiError(400, words, param="training_file", code="invalid_file") from error
    except Refused as error:
        raise ApiError(400, str(error), param=error.param) from error
    try:
        return job_object(store.create_job(data, name))
    except NotThere as error:
        raise ApiError(404, str(error), param="training_file", code="file_not_found") from error


def report_of(store: JobStore, file_id: str, param: str) -> Report:
    """The report of a file that the recipe names in a field. Raises ApiError 404 when it is not there."""
    try:
        record = store.get_file(file_id)
    except NotThere as error:
        raise ApiError(404, f"{param}: {error}", param=param, code="file_not_found") from error
    return msgspec.json.decode(record.report or "", type=Report)


@get("/v1/fine_tuning/jobs", sync_to_thread=True)
def list_jobs(state: AppState, after: FromQuery[str | None] = None, limit: Limit = 20) -> JobList:
    """Jobs, newest first."""
    try:
        jobs, more = state.store.list_jobs(after=after, limit=limit)
    except NotThere as error:
        raise ApiError(400, f"after: {error}", param="after") from error
    return JobList(data=[job_object(job) for job in jobs], has_more=more)


@get("/v1/fine_tuning/jobs/{job_id:str}", sync_to_thread=True)
def get_job(state: AppState, job_id: FromPath[str]) -> JobObject:
    """One job."""
    try:
        return job_object(state.store.get_job(job_id))
    except NotThere as error:
        raise not_found(error) from error


@post("/v1/fine_tuning/jobs/{job_id:str}/cancel", status_code=200, sync_to_thread=True)
def cancel_job(state: AppState, job_id: FromPath[str]) -> JobObject:
    """Stop a job: at once while it waits, within its next step while it runs."""
    try:
        return job_object(state.store.request_cancel(job_id))
    except NotThere as error:
        raise not_found(error) from error
    except IllegalTransition as error:
        raise ApiError(409, str(error), param="fine_tuning_job_id", code="job_finished") from error


@get("/v1/fine_tuning/jobs/{job_id:str}/events")
async def list_events(
    request: Request[Any, Any, Any],
    state: AppState,
    job_id: FromPath[str],
    after: FromQuery[str | None] = None,
    limit: Limit = 20,
    stream: FromQuery[bool] = False,
) -> Response[Any]:
    """Events, newest first; with stream=true (or Accept: text/event-stream) all of them from the first, or from the
    one behind `after` or Last-Event-ID, as server-sent events that follow the job to its end."""
    store: JobStore = state.store
    follow = stream or "text/event-stream" in request.headers.get("accept", "")
    if follow:
        after = request.headers.get("last-event-id", after)
    try:
        events, more = await asyncio.to_thread(
            store.list_events, job_id, after=after, limit=1 if follow else limit, oldest_first=follow
        )
    except NotThere as error:
        raise not_found(error) if after is None else ApiError(404, str(error), param="after") from error
    if not follow:
        return Response(EventList(data=[event_object(event) for event in events], has_more=more))
    lines = followed(store, job_id, after, state.stopping)
    return Stream(lines, media_type="text/event-stream", headers={"cache-control": "no-cache"})


async def followed(store: JobStore, job_id: str, after: str | None, stopping: asyncio.Event) -> AsyncIterator[bytes]:
    """Server-sent events until the job is finished or the server stops."""
    silent = 0.0
    while not stopping.is_set():
        # The state first: what happened before it was read is among the events read after it.
        job = await asyncio.to_thread(store.get_job, job_id)
        more = True
        while more:
            events, more = await asyncio.to_thread(store.list_events, job_id, after=after, limit=500, oldest_first=True)
            for event in events:
                body = msgspec.json.encode(event_object(event))
                yield b"id: %b\nevent: %b\ndata: %b\n\n" % (event.id.encode(), event.type.encode(), body)
                after, silent = event.id, 0.0
        if job.state in FINISHED:
            yield b"data: [DONE]\n\n"
            return
        await asyncio.sleep(FOLLOW_SECONDS)
        silent += FOLLOW_SECONDS
        if silent >= PING_SECONDS:
            yield b": the job goes on\n\n"
            silent = 0.0


@get("/v1/fine_tuning/jobs/{job_id:str}/checkpoints", sync_to_thread=True)
def list_checkpoints(
    state: AppState, job_id: FromPath[str], after: FromQuery[str | None] = None, limit: Limit = 10
) -> CheckpointList:
    """Checkpoints, newest first."""
    try:
        records, more = state.store.list_checkpoints(job_id, after=after, limit=limit)
    except NotThere as error:
        raise not_found(error) if after is None else ApiError(404, str(error), param="after") from error
    data = [checkpoint_object(record) for record in records]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return CheckpointList(data=data, has_more=more, first_id=first, last_id=last)


handlers = [create_job, list_jobs, get_job, cancel_job, list_events, list_checkpoints]
