"""The application: its routes, what they share, and the order in which it starts and stops."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path

from litestar import Litestar
from litestar.datastructures import State

from export.storage import Storage, StorageError
from finetune.data.files import FileStore
from finetune.jobs.executors.local import LocalExecutor
from finetune.jobs.store import JobStore
from server.access import Access
from server.errors import exception_handlers
from server.job_traces import JobTraces
from server.keys import KeyStore
from server.machine_metrics import MachineMetrics
from server.metrics import Metrics
from server.routes import (
    chat,
    classify,
    completions,
    deployments,
    docs,
    embeddings,
    files,
    health,
    images,
    jobs,
    keys,
    models,
    predict,
    tokenize,
    v2,
)
from server.runtime.repository import Repository
from server.settings import Settings, SettingsError
from server.traces import Traces, traces

log = logging.getLogger("espalier.app")


def create_app(settings: Settings, rates: Path | None = None) -> Litestar:
    """The application for `settings`. rates: a file in which its processes share what keys may still use. Nothing else
    is opened before its lifespan starts. Raises SettingsError for a setting that needs a package which is not
    installed."""
    metrics, access = Metrics(), Access(settings, rates)
    metrics.registry.register(access)
    state = State(
        {
            "settings": settings,
            "metrics": metrics,
            "access": access,
            "traces": traces(settings),
            "stopping": asyncio.Event(),
        }
    )
    if settings.grpc_port is not None and importlib.util.find_spec("grpc") is None:
        words = "grpc_port: gRPC is not installed; install it with `pip install 'espalier[grpc]'`"
        raise SettingsError(words)
    if settings.repository_url:
        try:
            Storage(settings.repository_url)
        except StorageError as error:
            raise SettingsError(f"repository_url: {error}") from error
    return Litestar(
        route_handlers=[
            *classify.handlers,
            *completions.handlers,
            *chat.handlers,
            *tokenize.handlers,
            *embeddings.handlers,
            *images.handlers,
            *predict.handlers,
            *files.handlers,
            *jobs.handlers,
            *models.handlers,
            *deployments.handlers,
            *keys.handlers,
            *v2.handlers,
            *health.handlers,
            *docs.handlers,
        ],
        state=state,
        lifespan=[lifespan],
        exception_handlers=exception_handlers,
        openapi_config=None,
        request_max_body_size=settings.max_body_bytes,
        logging_config=None,
    )


def grpc_serving(state: State) -> AbstractAsyncContextManager[None]:
    """gRPC beside HTTP, where the settings ask for it."""
    if state.settings.grpc_port is None:
        return nullcontext()
    from server.grpc.server import serving

    return serving(state)


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncIterator[None]:
    """Open the job store, sweep what a crash left, load the models, start the worker; and back in reverse."""
    settings: Settings = app.state.settings
    metrics: Metrics = app.state.metrics
    settings.home.mkdir(parents=True, exist_ok=True)
    store = await asyncio.to_thread(JobStore, settings.database)
    file_store = FileStore(settings.home / "files")
    known = [record.id for record in (await asyncio.to_thread(store.list_files, limit=10_000_000))[0]]
    await asyncio.to_thread(file_store.sweep, known)
    app.state.api_keys = KeyStore(store)
    await app.state.access.start(app.state.api_keys)
    sent: Traces | None = app.state.traces
    ended = None
    if sent is not None:
        sent.start()
        ended = JobTraces(store, sent.sender)
        ended.start()
    repository = Repository(settings, metrics)
    app.state.store, app.state.files, app.state.repository = store, file_store, repository
    metrics.jobs.states, metrics.jobs.training = store.counts_by_state, store.running_metrics
    metrics.registry.register(MachineMetrics({"home": settings.home, "repository": settings.repository}))
    await repository.start()
    executor = None
    if settings.worker and importlib.util.find_spec("torch") is None:
        log.warning("torch is not installed here: models are served, jobs wait for a worker elsewhere")
    elif settings.worker:
        executor = LocalExecutor(
            database=settings.database,
            home=settings.home,
            repository=settings.repository,
            backbones=settings.backbones,
        )
        await executor.start()
    app.state.executor = executor
    # What lives as long as the server is not looked through again: a full collection would hold up every request.
    gc.collect()
    gc.freeze()
    try:
        async with grpc_serving(app.state):
            yield
    finally:
        if executor is not None:
            await executor.stop()
        await repository.stop()
        await app.state.access.stop()
        if ended is not None:
            await ended.stop()
        if sent is not None:
            await sent.stop()
        await asyncio.to_thread(store.close)
