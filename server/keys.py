"""API keys in the database: made, listed, revoked, and what each has used.

A key is `esp_<8 hex digits>_<43 characters>`. The first part is its public id, which lists, logs and metrics show; the
rest is 256 random bits, shown once. Only the SHA-256 of the whole is kept. A slow hash, as for passwords, would buy
nothing: there is no dictionary of 256 random bits to try, and it would be paid for at every request.
"""

from __future__ import annotations

import enum
import hashlib
import re
import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import func, select

from finetune.jobs.schema import api_keys, key_usage
from finetune.jobs.store import JobStore


class Scope(enum.StrEnum):
    """What a key may do. infer: ask models, list them. train: files and fine-tuning jobs, list models. metrics: read
    /metrics. admin: all of these, and keys, deployments, loading and unloading."""

    INFER = "infer"
    TRAIN = "train"
    METRICS = "metrics"
    ADMIN = "admin"


KEY_ID = re.compile(r"esp_[0-9a-f]{8}")
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]*$")]
Count = Annotated[int, msgspec.Meta(ge=1, le=10**12)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Rates a minute, and quotas of a day and of a month of UTC; None: as many as come. Tokens are those that a model
    reads and writes: images and vectors have none."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    requests_per_day: Count | None = None
    tokens_per_day: Count | None = None
    requests_per_month: Count | None = None
    tokens_per_month: Count | None = None

    @property
    def quotas(self) -> bool:
        days = (self.requests_per_day, self.tokens_per_day)
        return any(limit is not None for limit in (*days, self.requests_per_month, self.tokens_per_month))


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is kept. number: counts all that were ever made, from 1. digest: hexadecimal SHA-256. Times are Unix
    seconds."""

    number: int
    id: str
    name: str
    digest: str
    scopes: list[Scope]
    limits: Limits
    created_at: float
    revoked_at: float | None


class Used(msgspec.Struct, frozen=True):
    """What a key used in this day and in this month of UTC."""

    day_requests: int = 0
    day_tokens: int = 0
    month_requests: int = 0
    month_tokens: int = 0
    last_at: float | None = None


class UnknownKey(LookupError):
    """No key has this id."""


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def today(now: float) -> str:
    """The day of UTC, e.g. "2026-11-26"."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")


class KeyStore:
    """The keys in a job store's database. Threads may share it. Every function is one transaction."""

    def __init__(self, store: JobStore) -> None:
        self.engine, self.reading = store.engine, store.reading

    def create(self, name: str, scopes: Iterable[Scope], limits: Limits) -> tuple[str, Key]:
        """A new key, which is told here and nowhere else, and what is kept of it."""
        prefix = f"esp_{secrets.token_hex(4)}"
        secret = f"{prefix}_{secrets.token_urlsafe(32)}"
        values = {
            "id": prefix,
            "name": name,
            "digest": digest_of(secret),
            "scopes": ",".join(sorted(set(scopes))),
            "limits": msgspec.json.encode(limits).decode(),
            "created_at": time.time(),
        }
        with self.engine.begin() as connection:
            row = connection.execute(api_keys.insert().values(values).returning(*api_keys.c)).one()
        return secret, _key(row)

    def all(self, *, revoked: bool = True) -> list[Key]:
        """Keys, the oldest first."""
        query = select(api_keys).order_by(api_keys.c.number)
        with self.reading.connect() as connection:
            rows = connection.execute(query if revoked else query.where(api_keys.c.revoked_at.is_(None))).all()
        return [_key(row) for row in rows]

    def revoke(self, key_id: str) -> Key:
        """From now on it opens nothing; one that was revoked before stays as it is. Raises UnknownKey."""
        unknown = UnknownKey(f"no key {key_id!r}; an id is what a key begins with, e.g. esp_0a1b2c3d")
        if not KEY_ID.fullmatch(key_id):
            raise unknown
        mine = api_keys.c.id == key_id
        with self.engine.begin() as connection:
            still = mine & api_keys.c.revoked_at.is_(None)
            connection.execute(api_keys.update().where(still).values(revoked_at=time.time()))
            row = connection.execute(select(api_keys).where(mine)).one_or_none()
        if row is None:
            raise unknown
        return _key(row)

    def state(self) -> tuple[int, int]:
        """Another one whenever a key was made or revoked, by whichever process."""
        with self.reading.connect() as connection:
            made, revoked = connection.execute(select(func.count(), func.count(api_keys.c.revoked_at))).one()
        return made, revoked

    def add_usage(self, day: str, used: Mapping[int, tuple[int, int]]) -> dict[int, Used]:
        """Count requests and tokens of keys, by their numbers, on top of what is there; what they have used then.

        Raises sqlalchemy.exc.IntegrityError where another server made the day's row in this moment: ask again.
        """
        table, now = key_usage.c, time.time()
        with self.engine.begin() as connection:
            for number, (requests, tokens) in sorted(used.items()):  # in one order, so that two servers never deadlock
                row = {"requests": table.requests + requests, "tokens": table.tokens + tokens, "last_at": now}
                there = (table.key_number == number) & (table.day == day)
                if not connection.execute(key_usage.update().where(there).values(row)).rowcount:
                    first = {"requests": requests, "tokens": tokens, "last_at": now}
                    connection.execute(key_usage.insert().values(key_number=number, day=day, **first))
            return _usage(connection, day, used)

    def usage(self, day: str, numbers: Collection[int]) -> dict[int, Used]:
        """What keys used on this day and in its month, by their numbers; nothing of one that was never used."""
        with self.reading.connect() as connection:
            return _usage(connection, day, numbers)


def _usage(connection: sa.Connection, day: str, numbers: Collection[int]) -> dict[int, Used]:
    table = key_usage.c
    on_day, in_month = table.day == day, table.day.between(f"{day[:7]}-01", f"{day[:7]}-31")
    sums = [
        func.sum(sa.case((when, column), else_=0))
        for when in (on_day, in_month)
        for column in (table.requests, table.tokens)
    ]
    query = select(table.key_number, *sums, func.max(table.last_at)).group_by(table.key_number)
    found = connection.execute(query.where(table.key_number.in_(list(numbers))))
    return {row[0]: Used(int(row[1]), int(row[2]), int(row[3]), int(row[4]), row[5]) for row in found}


def _key(row: sa.Row[Any]) -> Key:
    fields = dict(row._mapping)
    fields["scopes"] = [Scope(scope) for scope in fields["scopes"].split(",")]
    fields["limits"] = msgspec.json.decode(fields["limits"], type=Limits)
    return Key(**fields)
