"""/v1/keys: API keys are made, listed and revoked. Needs the scope admin, where keys are needed at all."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import msgspec
from litestar import delete, get, post
from litestar.datastructures import State
from litestar.params import FromPath, JSONBody

from server.access import Access
from server.errors import ApiError
from server.keys import Key, KeyStore, Limits, Name, Scope, UnknownKey, Used, today


class KeyRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """scopes: infer (ask models), train (files and fine-tuning jobs), metrics (read /metrics), admin (everything)."""

    name: Name
    scopes: Annotated[list[Scope], msgspec.Meta(min_length=1)]
    limits: Limits = Limits()


class KeyObject(msgspec.Struct, kw_only=True):
    """A key without its secret: `id` is what it begins with. Times are Unix seconds. `used`: in this day and month of
    UTC, as of a second ago."""

    id: str
    name: str
    scopes: list[Scope]
    limits: Limits
    created_at: int
    revoked_at: int | None
    used: Used
    object: str = "api_key"


class NewKey(KeyObject, kw_only=True):
    """`key` is told this once."""

    key: str


class KeyList(msgspec.Struct, kw_only=True):
    data: list[KeyObject]
    object: str = "list"


def described(key: Key, used: Used) -> KeyObject:
    revoked_at = None if key.revoked_at is None else int(key.revoked_at)
    return KeyObject(
        id=key.id,
        name=key.name,
        scopes=key.scopes,
        limits=key.limits,
        created_at=int(key.created_at),
        revoked_at=revoked_at,
        used=used,
    )


@post("/v1/keys", status_code=200)
async def create_key(state: State, data: JSONBody[KeyRequest]) -> NewKey:
    """Make a key."""
    keys: KeyStore = state.api_keys
    access: Access = state.access
    secret, key = await asyncio.to_thread(keys.create, data.name, data.scopes, data.limits)
    if access.on:
        await access.refresh()
    return NewKey(**msgspec.structs.asdict(described(key, Used())), key=secret)


@get("/v1/keys", sync_to_thread=True)
def list_keys(state: State) -> KeyList:
    """All keys, the oldest first, the revoked ones too."""
    keys: KeyStore = state.api_keys
    found = keys.all()
    used = keys.usage(today(time.time()), [key.number for key in found])
    return KeyList(data=[described(key, used.get(key.number, Used())) for key in found])


@delete("/v1/keys/{key_id:str}", status_code=200)
async def revoke_key(state: State, key_id: FromPath[str]) -> KeyObject:
    """Revoke a key: within a second it opens nothing any more, in no process."""
    keys: KeyStore = state.api_keys
    access: Access = state.access
    try:
        key = await asyncio.to_thread(keys.revoke, key_id)
    except UnknownKey as error:
        raise ApiError(404, str(error), param="key_id", code="key_not_found") from error
    if access.on:
        await access.refresh()
    used = await asyncio.to_thread(keys.usage, today(time.time()), [key.number])
    return described(key, used.get(key.number, Used()))


handlers = [create_key, list_keys, revoke_key]
