"""GET /v2/models/{model}[/versions/{version}]: metadata, /ready, /config and /stats."""

from __future__ import annotations

from litestar import Response, get
from litestar.datastructures import State
from litestar.params import FromPath

from server import descriptions
from server.descriptions import ModelConfig, ModelMetadata, Readiness, Statistics

MODEL, VERSION = "/v2/models/{model:str}", "/v2/models/{model:str}/versions/{version:str}"


@get(MODEL)
async def model_metadata(state: State, model: FromPath[str]) -> ModelMetadata:
    """Its tensors, and which versions are loaded."""
    found = await descriptions.find(state.repository, model)
    return descriptions.model_metadata(found, state.repository)


@get(VERSION)
async def version_metadata(state: State, model: FromPath[str], version: FromPath[str]) -> ModelMetadata:
    found = await descriptions.find(state.repository, model, version)
    return descriptions.model_metadata(found, state.repository)


@get(f"{MODEL}/ready", sync_to_thread=False)
def model_ready(state: State, model: FromPath[str]) -> Response[Readiness]:
    """200 where requests may be sent to it, 404 where there is no such model, 503 once the server is stopping."""
    return readiness(state, model, "")


@get(f"{VERSION}/ready", sync_to_thread=False)
def version_ready(state: State, model: FromPath[str], version: FromPath[str]) -> Response[Readiness]:
    return readiness(state, model, version)


def readiness(state: State, model: str, version: str) -> Response[Readiness]:
    if not descriptions.is_ready(state.repository, model, version):
        return Response(Readiness(model, False), status_code=404)
    stopping: bool = state.stopping.is_set()
    return Response(Readiness(model, not stopping), status_code=503 if stopping else 200)


@get(f"{MODEL}/config")
async def model_config(state: State, model: FromPath[str]) -> ModelConfig:
    """In the shape that Triton's configuration has."""
    return descriptions.model_config(await descriptions.find(state.repository, model))


@get(f"{VERSION}/config")
async def version_config(state: State, model: FromPath[str], version: FromPath[str]) -> ModelConfig:
    return descriptions.model_config(await descriptions.find(state.repository, model, version))


@get("/v2/models/stats")
async def all_statistics(state: State) -> Statistics:
    """Counts and durations since the server started, of every loaded version of every model."""
    await state.metrics.gathered()
    return descriptions.statistics(state.repository, state.metrics)


@get(f"{MODEL}/stats")
async def model_statistics(state: State, model: FromPath[str]) -> Statistics:
    await state.metrics.gathered()
    return descriptions.statistics(state.repository, state.metrics, model)


@get(f"{VERSION}/stats")
async def version_statistics(state: State, model: FromPath[str], version: FromPath[str]) -> Statistics:
    await state.metrics.gathered()
    return descriptions.statistics(state.repository, state.metrics, model, version)


handlers = [
    model_metadata,
    version_metadata,
    model_ready,
    version_ready,
    model_config,
    version_config,
    all_statistics,
    model_statistics,
    version_statistics,
]
