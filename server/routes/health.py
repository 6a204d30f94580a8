"""GET /health/live, /health/ready and /metrics."""

from __future__ import annotations

import msgspec
from litestar import Response, get
from litestar.datastructures import State

from server.metrics import Metrics
from server.runtime.repository import Repository


class Health(msgspec.Struct, kw_only=True):
    """`models`: how many are served, those included that are loaded when they are asked for."""

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
    served = sum(view.newest is not None for view in repository.views.values())
    return Response(Health(status="ready", models=served))


@get("/metrics", sync_to_thread=True)
def metrics(state: State) -> Response[bytes]:
    """All metrics in Prometheus's text format."""
    found: Metrics = state.metrics
    return Response(found.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


handlers = [live, ready, metrics]
