"""GET /v2, /v2/health/live and /v2/health/ready."""

from __future__ import annotations

import msgspec
from litestar import Response, get
from litestar.datastructures import State

from server.descriptions import REST_EXTENSIONS, ServerMetadata


class Live(msgspec.Struct):
    live: bool


class Ready(msgspec.Struct):
    ready: bool


@get("/v2", sync_to_thread=False)
def server_metadata() -> ServerMetadata:
    """Who answers, and which extensions of the protocol."""
    return ServerMetadata(REST_EXTENSIONS)


@get("/v2/health/live", sync_to_thread=False)
def server_live() -> Live:
    """The process answers."""
    return Live(True)


@get("/v2/health/ready", sync_to_thread=False)
def server_ready(state: State) -> Response[Ready]:
    """The models that were there at the start are loaded, and the server is not about to stop; else 503."""
    stopping: bool = state.stopping.is_set()
    return Response(Ready(not stopping), status_code=503 if stopping else 200)


handlers = [server_metadata, server_live, server_ready]
