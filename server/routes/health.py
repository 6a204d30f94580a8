"""GET /health/live, /health/ready and /metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.datastructures import State

from server.metrics import Metrics
from server.runtime.repository import Repository

OPEN_METRICS = "application/openmetrics-text"


class Health(msgspec.Struct, kw_only=True):
    """`models`: how many are served, those included that are loaded when they are asked for."""

    status: str
    server: str = "espalier"
    models: int | None = None


LIVE = Health(status="live")


@get("/health/live", sync_to_thread=False)
def live() -> Health:
    """The process answers."""
    return LIVE


@get("/health/ready", sync_to_thread=False)
def ready(state: State) -> Response[Health]:
    """The models that were there at the start are loaded, and the server is not about to stop; else 503."""
    repository: Repository = state.repository
    if state.stopping.is_set():
        return Response(Health(status="stopping"), status_code=503)
    served = sum(view.newest is not None for view in repository.views.values())
    return Response(Health(status="ready", models=served))


@get("/metrics")
async def metrics(request: Request[Any, Any, Any], state: State) -> Response[bytes]:
    """All metrics in Prometheus's text format, or in OpenMetrics where that is accepted."""
    found: Metrics = state.metrics
    await found.gathered()
    accepted = [one.partition(";")[0].strip() for one in request.headers.get("accept", "").split(",")]
    if OPEN_METRICS in accepted:
        body = await asyncio.to_thread(found.render_open)
        return Response(body, media_type=f"{OPEN_METRICS}; version=1.0.0; charset=utf-8")
    body = await asyncio.to_thread(found.render)
    return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")


handlers = [live, ready, metrics]
