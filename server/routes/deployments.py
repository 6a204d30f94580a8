"""/v1/models/{name}/deployment and /aliases/{alias}: how a model is served, changed while it is.

Every answer of a deployment has an ETag; a change with If-Match is made only to the deployment that has it, else it is
412. What a change names is loaded before anything is replaced, so that no request finds it half made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
from litestar import Request, Response, delete, get, patch, put
from litestar.datastructures import State
from litestar.params import FromPath

from server.errors import ApiError
from server.exchange import decode_json
from server.runtime.deployment import ALIAS, Deployment, DeploymentError, Version, encoded
from server.runtime.references import UnknownModel
from server.runtime.repository import CannotLoad, Repository, UnknownVersion

AnyRequest = Request[Any, Any, Any]

# Maps, whose entries a PATCH changes one by one; every other field it replaces as a whole.
MAPS = ("aliases", "traffic")


class AliasRequest(msgspec.Struct, forbid_unknown_fields=True):
    """version: that the alias is to mean. expected: the one that it must mean now, null: none; else 409. Left out, it
    is moved in any case."""

    version: Version
    expected: Version | msgspec.UnsetType | None = msgspec.UNSET


class AliasObject(msgspec.Struct, kw_only=True):
    """`model`@`alias` means `version`; null where the alias is gone. `was`: what it meant before."""

    model: str
    alias: str
    version: int | None
    was: int | None
    object: str = "model.alias"


whole = msgspec.json.Decoder(Deployment)
part = msgspec.json.Decoder(dict[str, Any])
moved = msgspec.json.Decoder(AliasRequest)


@get("/v1/models/{name:str}/deployment")
async def get_deployment(state: State, name: FromPath[str]) -> Response[Deployment]:
    """How a model is served."""
    try:
        return answered(await repository_of(state).deployment(name))
    except (UnknownModel, DeploymentError, OSError) as error:
        raise told(error) from error


@put("/v1/models/{name:str}/deployment")
async def put_deployment(state: State, request: AnyRequest, name: FromPath[str]) -> Response[Deployment]:
    """Replace how a model is served; what is left out is by default."""
    deployment: Deployment = decode_json(await request.body(), whole)
    return answered(await change(state, request, name, lambda _: deployment))


@patch("/v1/models/{name:str}/deployment")
async def patch_deployment(state: State, request: AnyRequest, name: FromPath[str]) -> Response[Deployment]:
    """Change some of how a model is served."""
    changes: dict[str, Any] = decode_json(await request.body(), part)
    return answered(await change(state, request, name, lambda old: patched(old, changes)))


@put("/v1/models/{name:str}/aliases/{alias:str}")
async def put_alias(state: State, request: AnyRequest, name: FromPath[str], alias: FromPath[str]) -> AliasObject:
    """Let an alias mean a version, which is loaded first."""
    if not ALIAS.fullmatch(alias):
        raise ApiError(400, f"alias {alias!r}: letters, digits and ._- after a letter, at most 64", param="alias")
    wanted: AliasRequest = decode_json(await request.body(), moved)
    was: int | None = None

    def move(old: Deployment) -> Deployment:
        nonlocal was
        was = old.aliases.get(alias)
        if wanted.expected is not msgspec.UNSET and wanted.expected != was:
            raise ApiError(409, f"{name}@{alias} means {was or 'nothing'}, not {wanted.expected or 'nothing'}")
        return msgspec.structs.replace(old, aliases={**old.aliases, alias: wanted.version})

    await change(state, request, name, move, unknown=404)
    return AliasObject(model=name, alias=alias, version=wanted.version, was=was)


@delete("/v1/models/{name:str}/aliases/{alias:str}", status_code=200)
async def delete_alias(state: State, request: AnyRequest, name: FromPath[str], alias: FromPath[str]) -> AliasObject:
    """Let an alias mean nothing."""
    was: int | None = None

    def remove(old: Deployment) -> Deployment:
        nonlocal was
        if (was := old.aliases.get(alias)) is None:
            raise ApiError(404, f"{name} has no alias {alias!r}", param="alias", code="alias_not_found")
        return msgspec.structs.replace(old, aliases={one: v for one, v in old.aliases.items() if one != alias})

    await change(state, request, name, remove)
    return AliasObject(model=name, alias=alias, version=None, was=was)


async def change(
    state: State, request: AnyRequest, name: str, to: Callable[[Deployment], Deployment], unknown: int = 400
) -> Deployment:
    """unknown: the status where a version is named that is not there."""
    expected = request.headers.get("if-match")

    def checked(old: Deployment) -> Deployment:
        if expected is not None and expected.strip() not in ("*", etag(old)):
            raise ApiError(412, f"the deployment of {name} is another by now; its ETag is {etag(old)}")
        return to(old)

    try:
        return await repository_of(state).deploy(name, checked)
    except (UnknownModel, CannotLoad, DeploymentError, OSError) as error:
        raise told(error, unknown) from error


def patched(old: Deployment, changes: dict[str, Any]) -> Deployment:
    """As RFC 7396 has it, but that a field which is no map is replaced as a whole; null is the default. Raises ApiError
    400."""
    fields: dict[str, Any] = msgspec.to_builtins(old)
    for name, value in changes.items():
        if name in MAPS and isinstance(value, dict):
            fields[name] = {one: new for one, new in {**fields[name], **value}.items() if new is not None}
        elif value is None:
            fields.pop(name, None)
        else:
            fields[name] = value
    found: Deployment = decode_json(msgspec.json.encode(fields), whole)
    return found


def answered(deployment: Deployment) -> Response[Deployment]:
    return Response(deployment, headers={"etag": etag(deployment)})


def etag(deployment: Deployment) -> str:
    return f'"{hashlib.sha256(encoded(deployment)).hexdigest()[:16]}"'


def told(error: Exception, unknown: int = 400) -> ApiError:
    """unknown: the status where a version is named that is not there."""
    match error:
        case UnknownVersion(field=field):
            return ApiError(unknown, str(error), param=field, code="version_not_found")
        case UnknownModel():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case CannotLoad(retry_after=None):
            return ApiError(409, f"{error}; all stays as it was", code="model_unavailable")
        case CannotLoad(retry_after=seconds):
            headers = {"retry-after": str(seconds)}
            return ApiError(503, f"{error}; all stays as it was", code="model_unavailable", headers=headers)
        case DeploymentError(field=str(field)):
            return ApiError(400, f"{field}: {error}", param=field)
        case DeploymentError():
            return ApiError(409, f"{error}; mend the file, or delete it", code="broken_deployment")
    return ApiError(503, f"the repository: {error}", code="repository_unavailable")


def repository_of(state: State) -> Repository:
    found: Repository = state.repository
    return found


handlers = [get_deployment, put_deployment, patch_deployment, put_alias, delete_alias]
