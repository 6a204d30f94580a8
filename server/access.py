"""Who may call, how often, and how much.

A request names its key in Authorization: Bearer …; it is looked up by the whole header, and where that is new by the
SHA-256 of the key, so a key costs a dictionary's look-up. Keys are read from the database when one was made or revoked
there, which is looked for twice a second: a revoked key opens nothing a second later, in whichever process. What keys
use is added to the database once a second. A process that is killed loses the count of its last second, and where
several share a key, a quota may be overdrawn by what they admit in one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Send
from litestar.types import Scope as AsgiScope
from prometheus_client.core import Metric

from server.errors import ApiError, body_at
from server.keys import Key, KeyStore, Limits, Scope, Used, today
from server.rates import NEARLY, Bucket, Buckets
from server.scopes import scopes_for
from server.settings import Settings

log = logging.getLogger("espalier.access")

DAY_SECONDS = 86_400
LOOK_SECONDS = 0.5
FLUSH_SECONDS = 1.0
# Spellings of the header that are remembered; a key has one, unless somebody plays with spaces.
MOST_SPELLINGS = 4096

HOW = "send a key as Authorization: Bearer esp_…; `espalier keys create` and POST /v1/keys make them"


class Caller:
    """A key as this process knows it. id: its public part. used: up to the last flush, in `day` and its
    month. requests, tokens: since then."""

    __slots__ = (
        "access",
        "admitted",
        "day",
        "id",
        "key",
        "limited",
        "request_rate",
        "requests",
        "scopes",
        "token_rate",
        "tokens",
        "used",
    )

    def __init__(self, access: Access, key: Key, used: Used, day: int) -> None:
        self.access, self.key, self.used, self.day = access, key, used, day
        self.id, self.scopes = key.id, frozenset(key.scopes)
        self.limited = key.limits != Limits()
        self.admitted = (key.id, "admitted")
        self.requests = self.tokens = 0
        limits, buckets = key.limits, access.buckets
        self.request_rate: Bucket | None = None
        self.token_rate: Bucket | None = None
        if limits.requests_per_minute is not None:
            self.request_rate = Bucket(buckets, key.number, "requests", limits.requests_per_minute)
        if limits.tokens_per_minute is not None:
            self.token_rate = Bucket(buckets, key.number, "tokens", limits.tokens_per_minute)

    def spend(self, tokens: int) -> None:
        """Count what the answer to an admitted request took, once that is known: rates and quotas of tokens refuse what
        comes after they are used up."""
        self.tokens += tokens
        if self.token_rate is not None and tokens:
            access, number = self.access, self.key.number
            access.buckets.lock(number)
            self.token_rate.take(tokens, access.clock())
            access.buckets.unlock(number)

    def enter(self) -> None:
        """Raises ApiError 429 where a limit does not let a request in."""
        if self.key.limits.quotas:
            self._check_quotas()
        if self.request_rate is None and self.token_rate is None:
            return
        access, number = self.access, self.key.number
        access.buckets.lock(number)
        try:
            now = access.clock()
            # A request is let in while there are any tokens: how many it will take, nobody knows before.
            if (tokens := self.token_rate) is not None and tokens.left(now) < NEARLY:
                raise self._too_fast(tokens, now)
            if (requests := self.request_rate) is not None:
                if requests.left(now) < 1.0 - NEARLY:
                    raise self._too_fast(requests, now)
                requests.take(1, now)
        finally:
            access.buckets.unlock(number)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """x-ratelimit-… of OpenAI, for the response; none where no rate is limited."""
        now = self.access.clock()
        return [header for rate in (self.request_rate, self.token_rate) if rate for header in rate.headers(now)]

    def _too_fast(self, rate: Bucket, now: float) -> ApiError:
        self.access.outcomes[self.id, "limited"] += 1
        seconds = max(1, math.ceil((1.0 - rate.left(now)) * rate.each))
        headers = {name.decode(): value.decode() for name, value in self.headers()} | {"retry-after": str(seconds)}
        message = f"key {self.id} may use {rate.per_minute} {rate.kind} a minute; try again in {seconds} s"
        return ApiError(429, message, type=rate.kind, code="rate_limit_exceeded", headers=headers)

    def _check_quotas(self) -> None:
        now = self.access.wall()
        if (day := day_of(now)) != self.day:
            # What was used since the last flush was used before this day: it is taken off, since it will be added.
            month = (self.used.month_requests, self.used.month_tokens)
            before = (-self.requests, -self.tokens)
            same = today(now)[:7] == today(self.day * DAY_SECONDS)[:7]
            self.used = Used(*before, *(month if same else before))
            self.day = day
        used, limits = self.used, self.key.limits
        for period, kind, limit, spent in (
            ("day", "requests", limits.requests_per_day, used.day_requests + self.requests),
            ("month", "requests", limits.requests_per_month, used.month_requests + self.requests),
            ("day", "tokens", limits.tokens_per_day, used.day_tokens + self.tokens),
            ("month", "tokens", limits.tokens_per_month, used.month_tokens + self.tokens),
        ):
            if limit is not None and spent >= limit:
                self.access.outcomes[self.id, "limited"] += 1
                seconds = seconds_left(period, now)
                message = f"key {self.id} has used its {limit} {kind} of this {period}; the next begins in {seconds} s"
                headers = {"retry-after": str(seconds), "x-should-retry": "false"}
                raise ApiError(429, message, type="insufficient_quota", code="insufficient_quota", headers=headers)


class Access:
    """The keys that one process lets in. Lives on the event loop; `on` is False where nobody needs a key."""

    def __init__(
        self,
        settings: Settings,
        shared: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """shared: a file that all processes of a server keep their rates in; None: this process is alone. clock, wall:
        seconds, of a clock that all of these share and of Unix."""
        self.settings, self.clock, self.wall = settings, clock, wall
        self.on = settings.auth == "on" or (settings.auth == "auto" and not is_loopback(settings.host))
        self.open_metrics = settings.open_metrics
        self.buckets = Buckets(shared)
        self.outcomes: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.callers: dict[str, Caller] = {}  # by the digest of their key
        self.known: dict[bytes, Caller] = {}  # by the header that names it
        self.revoked: list[Caller] = []  # with uses that are not in the database yet
        self.state: tuple[int, int] | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.strangers_told = -math.inf

    async def start(self, keys: KeyStore) -> None:
        """Read the keys, and go on looking whether there are others."""
        self.keys = keys
        if not self.on:
            return
        await self.refresh()
        if not self.callers:
            command = "espalier keys create --scopes infer,train --name ci"
            where = f"--home {self.settings.home}"
            log.warning("requests need an API key and there is none yet; make one with: %s %s", command, where)
        self.tasks = [
            asyncio.create_task(self._again(LOOK_SECONDS, self.refresh)),
            asyncio.create_task(self._again(FLUSH_SECONDS, self.flush)),
        ]

    async def stop(self) -> None:
        """Count what was used last."""
        for task in self.tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        if self.tasks:
            try:
                await self.flush()
            except Exception as error:
                log.error("what keys used last is not counted: %s", error)
        self.tasks = []

    def admit(
        self, headers: Iterable[tuple[bytes, bytes]], method: str, path: str, client: tuple[str, int] | None
    ) -> Caller | None:
        """Who asks; None where nobody needs to say. headers: names in lower case. path: decoded, without the query; of
        gRPC the name of the method, /package.Service/Method.

        Raises ApiError 401, 403, and 429 with Retry-After.
        """
        if not self.on:
            return None
        needed = scopes_for(method, path)
        if needed is None or (self.open_metrics and path == "/metrics"):
            return None
        header = next((value for name, value in headers if name == b"authorization"), None)
        if header is None:
            raise self._stranger(f"this needs an API key; {HOW}", 'Bearer realm="espalier"')
        # A table by what was sent leaks nothing that helps to guess: bytes are only compared where their keyed hashes
        # are equal.
        caller = self.known.get(header)
        if caller is None:
            caller = self._recognize(header, client)
        if caller.scopes.isdisjoint(needed):
            self.outcomes[caller.id, "forbidden"] += 1
            raise missing(caller, needed)
        if caller.limited:
            caller.enter()
        caller.requests += 1
        self.outcomes[caller.admitted] += 1
        return caller

    async def refresh(self) -> None:
        """Read the keys again if one was made or revoked."""
        state = await asyncio.to_thread(self.keys.state)
        if state == self.state:
            return
        found = await asyncio.to_thread(self.keys.all, revoked=False)
        now = self.wall()
        used = await asyncio.to_thread(self.keys.usage, today(now), [key.number for key in found if key.limits.quotas])
        before, self.callers = self.callers, {}
        for key in found:
            known = before.pop(key.digest, None)
            self.callers[key.digest] = known or Caller(self, key, used.get(key.number, Used()), day_of(now))
        self.known.clear()
        self.state = state
        self.revoked += before.values()

    async def flush(self) -> None:
        """Add what was used to the database, and learn what these keys have used in all, here and elsewhere."""
        now = self.wall()
        busy = [caller for caller in (*self.callers.values(), *self.revoked) if caller.requests or caller.tokens]
        if not busy:
            return
        taken = [(caller, caller.requests, caller.tokens) for caller in busy]
        used = {caller.key.number: (requests, tokens) for caller, requests, tokens in taken}
        totals = await asyncio.to_thread(self.keys.add_usage, today(now), used)
        for caller, requests, tokens in taken:
            caller.requests -= requests
            caller.tokens -= tokens
            caller.used, caller.day = totals[caller.key.number], day_of(now)
        self.revoked = [caller for caller in self.revoked if caller.requests or caller.tokens]

    def collect(self) -> Iterator[Metric]:
        """For prometheus-client."""
        requests = Metric(
            "espalier_key_requests", "requests by the public part of their key, and what became of them", "counter"
        )
        for (key, outcome), count in list(self.outcomes.items()):
            requests.add_sample("espalier_key_requests_total", {"key": key, "outcome": outcome}, count)
        yield requests

    def _recognize(self, header: bytes, client: tuple[str, int] | None) -> Caller:
        """The caller that a header names. Raises ApiError 401."""
        kind, _, token = header.partition(b" ")
        token = token.strip()
        if kind.lower() != b"bearer" or not token:
            raise self._stranger(f"the Authorization header names no key; {HOW}", 'Bearer realm="espalier"')
        digest = hashlib.sha256(token).hexdigest()
        caller = self.callers.get(digest)
        if caller is None or not hmac.compare_digest(caller.key.digest, digest):
            now = self.clock()
            if now - self.strangers_told > 1.0:
                self.strangers_told = now
                log.warning("a key that does not exist, or no more, was sent from %s", client[0] if client else "?")
            wrong = 'Bearer realm="espalier", error="invalid_token"'
            raise self._stranger(f"this API key does not exist, or was revoked; {HOW}", wrong)
        if len(self.known) >= MOST_SPELLINGS:
            self.known.clear()
        self.known[header] = caller
        return caller

    def _stranger(self, message: str, challenge: str) -> ApiError:
        self.outcomes["", "unauthorized"] += 1
        return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})

    async def _again(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await act()
            except Exception as error:  # keys stay as they are known, and what was used is added next time
                log.error("the database of the API keys does not answer: %s", error)


class AccessLayer:
    """ASGI application around another: lets in who may call, and tells their limits in the response."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        try:
            caller = self.access.admit(scope["headers"], scope["method"], path, scope["client"])
        except ApiError as error:
            await refuse(error, path, send)
            return
        if caller is not None:
            scope.setdefault("state", {})["caller"] = caller
        if caller is None or not caller.limited:
            await self.app(scope, receive, send)
            return

        async def with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *caller.headers()]
            await send(message)

        await self.app(scope, receive, with_limits)


async def refuse(error: ApiError, path: str, send: Send) -> None:
    body = body_at(path, error)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *((name.encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def missing(caller: Caller, needed: frozenset[Scope]) -> ApiError:
    """Of a key that may not do what is asked."""
    names = [scope.value for scope in Scope if scope in needed - {Scope.ADMIN}] or [Scope.ADMIN.value]
    has = ", ".join(scope for scope in Scope if scope in caller.scopes)
    message = f"this needs the scope {' or '.join(names)}; key {caller.id} has {has}"
    challenge = f'Bearer realm="espalier", error="insufficient_scope", scope="{names[0]}"'
    return ApiError(403, message, code="insufficient_scope", headers={"www-authenticate": challenge})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def day_of(now: float) -> int:
    """The day of UTC, counted from 1970."""
    return int(now // DAY_SECONDS)


def seconds_left(period: str, now: float) -> int:
    """Of this day, or of this month, of UTC."""
    moment = datetime.fromtimestamp(now, UTC)
    end = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    end = end + timedelta(days=1) if period == "day" else (end.replace(day=1) + timedelta(days=32)).replace(day=1)
    return max(1, math.ceil(end.timestamp() - now))
