"""GET /health/live, /health/ready and /metrics."""

from __future__ import annotations

import asyncio

import msgspec
from litestar import Response, get
from litestar.datastructures import State

from server.metrics import Metrics
from server.runtime.repository import Repository


class Health(msgspec.Struct, kw_only=True):
    """`models`: how many are served."""

    status: str
    server: str = "espalier"
    models: int | None = None


@get("/health/live", sync_to_thread=False)
def live() -> Health:
    """The process answers."""
    return Health(status="live")


@get("/health/ready", sync_to_thread=False)
def ready(state: State) -> Response[Health]:
    """The models that were there at the start are loaded, and the server is not about to stop; else 503."""
    repository: Repository = state.repository
    if state.stopping.is_set():
        return Response(Health(status="stopping"), status_code=503)
    return Response(Health(status="ready", models=len(repository.models)))


@get("/metrics")
async def metrics(state: State) -> Response[bytes]:
    """All metrics in Prometheus's text format."""
    found: Metrics = state.metrics
    if found.gather is not None:
        await found.gather()
    return Response(await asyncio.to_thread(found.render), media_type="text/plain; version=0.0.4; charset=utf-8")


handlers = [live, ready, metrics]
