"""POST /v2/repository/index, /v2/repository/models/{model}/load and /unload."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, post
from litestar.datastructures import State
from litestar.params import FromPath

from server import descriptions
from server.descriptions import IndexEntry
from server.exchange import decode_json


class IndexRequest(msgspec.Struct):
    """ready: only what can be asked now."""

    ready: bool = False


class LoadRequest(msgspec.Struct):
    """parameters: Triton's `config` and `file:…`, which are refused; a model is loaded as it was published."""

    parameters: dict[str, Any] = {}


class UnloadParameters(msgspec.Struct, frozen=True):
    """unload_dependents: taken; no model here depends on another."""

    unload_dependents: bool = False


class UnloadRequest(msgspec.Struct):
    parameters: UnloadParameters = UnloadParameters()


class Done(msgspec.Struct):
    pass


# Triton's clients send JSON without saying that it is, or nothing at all.
index_decoder = msgspec.json.Decoder(IndexRequest)
load_decoder = msgspec.json.Decoder(LoadRequest)
unload_decoder = msgspec.json.Decoder(UnloadRequest)


@post("/v2/repository/index", status_code=200)
async def repository_index(state: State, request: Request[Any, Any, Any]) -> list[IndexEntry]:
    """What is in the repository, loaded or not."""
    asked: IndexRequest = decode_json(await request.body() or b"{}", index_decoder)
    return descriptions.index(state.repository, asked.ready)


@post("/v2/repository/models/{model:str}/load", status_code=200)
async def load_model(state: State, request: Request[Any, Any, Any], model: FromPath[str]) -> Done:
    """Load a model, or its newest version where that is another; answered when it is ready."""
    asked: LoadRequest = decode_json(await request.body() or b"{}", load_decoder)
    descriptions.check_load(asked.parameters)
    await state.repository.load(model)
    return Done()


@post("/v2/repository/models/{model:str}/unload", status_code=200)
async def unload_model(state: State, request: Request[Any, Any, Any], model: FromPath[str]) -> Done:
    """Serve a model no more; answered when the requests that it had are."""
    decode_json(await request.body() or b"{}", unload_decoder)
    await state.repository.unload(model)
    return Done()


handlers = [repository_index, load_model, unload_model]
