"""One request to a hot inference route: what is read of it, which model it names, how it is answered.

The routes are bare ASGI handlers mounted in the Litestar application, for speed; everything else about them (errors,
OpenAPI, metrics) is as with the typed ones. X-Request-Timeout (seconds) drops a request that has waited longer, with a
408; one that writes a text, where it is not done by then.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar, cast
from urllib.parse import parse_qs

import msgspec
from litestar.types import HTTPDisconnectEvent, HTTPRequestEvent, HTTPScope, Receive, Scope, Send

from export.processing.inputs import BadInput
from server.access import Caller
from server.errors import ApiError, request_id
from server.metrics import Metrics
from server.runtime.batcher import Block, ClientGone, DeadlinePassed, QueueFull, RunFailed, Ticket, Wanted
from server.runtime.model import Model
from server.runtime.repository import CannotLoad, NotLoaded, Repository, UnknownModel
from server.settings import Settings

log = logging.getLogger("espalier.inference")

encoder = msgspec.json.Encoder()

T = TypeVar("T")


class Usage(msgspec.Struct):
    """`prompt_tokens`: tokens read, 0 for images and vectors."""

    prompt_tokens: int
    total_tokens: int


# What a model that cannot do something is asked for instead.
PLACES = {
    "chat": ("chat", "/v1/chat/completions"),
    "classify": ("classify", "/v1/classify"),
    "complete": ("write texts", "/v1/completions"),
    "embedding": ("embed", "/v1/embeddings"),
    "generate": ("make images", "/v1/images/generations"),
    "predict": ("predict", "/v1/predict"),
}


def cannot(model: Model, answer: str) -> str:
    """Why a model is asked at the wrong place, and what the right one is."""
    verb = PLACES[answer][0]
    if answer == "chat" and model.engine is not None:
        verb = "chat, for want of a chat template"
    right = " or ".join(place for name, (_, place) in PLACES.items() if name in model.answers)
    return f"{model.name} does not {verb}; ask it at {right}"


class Exchange:
    """One request: its scope, where its body comes from, and what has been seen of it."""

    def __init__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        state = scope["litestar_app"].state
        self.repository: Repository = state.repository
        self.metrics: Metrics = state.metrics
        self.settings: Settings = state.settings
        self.caller: Caller | None = scope.get("state", {}).get("caller")
        self.start = time.perf_counter()
        self.model: Model | None = None
        self.content_type = ""
        # In how many seconds it must have begun; and in how many it must be done, where the client has said so.
        self.timeout = self.settings.request_seconds
        self.asked_timeout: float | None = None
        self.length: int | None = None
        self.received = 0
        self.streaming = False

    def read_headers(self) -> None:
        """Raises ApiError 405 for another method than POST, 400 for a timeout that is none."""
        if self.scope["method"] != "POST":
            raise ApiError(405, f"{self.scope['method']} is not allowed here; use POST", headers={"allow": "POST"})
        for name, value in self.scope["headers"]:
            if name == b"content-type":
                self.content_type = value.decode("latin-1")
            elif name == b"x-request-timeout":
                self.asked_timeout = seconds_of(value)
                self.timeout = min(self.timeout, self.asked_timeout)
            elif name == b"content-length":
                self.length = int(value) if value.isdigit() else None

    async def piece(self) -> tuple[bytes, bool]:
        """The next part of the body, and whether more comes. Raises ApiError 413 beyond the limit, ClientGone."""
        limit = self.settings.max_body_bytes
        if self.length is not None and self.length > limit:
            raise too_large(limit)
        message = cast(HTTPRequestEvent | HTTPDisconnectEvent, await self.receive())
        if message["type"] == "http.disconnect":
            raise ClientGone
        self.received += len(message["body"])
        if self.received > limit:
            raise too_large(limit)
        return message["body"], message["more_body"]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises as `piece` does."""
        more = True
        while more:
            body, more = await self.piece()
            yield body

    async def body(self) -> bytes:
        """The whole body. Raises as `piece` does, and ApiError 400 when it is empty."""
        whole, more = await self.piece()
        if more:
            pieces = [whole]
            while more:
                body, more = await self.piece()
                pieces.append(body)
            whole = b"".join(pieces)
        if not whole:
            raise ApiError(400, "the body is empty; send JSON, a form or the bytes of an input")
        return whole

    def fields(self) -> dict[str, str]:
        """Fields of the address: ?model=…&top_k=…"""
        query = self.scope["query_string"].decode("latin-1")
        return {name: values[0] for name, values in parse_qs(query).items()}

    def gone(self) -> bool:
        """Whether the client has disconnected: `receive` is asked, and left again where it begins to wait."""
        asking = self.receive().__await__()
        try:
            next(asking)
        except StopIteration as answer:
            return bool(answer.value["type"] == "http.disconnect")
        asking.close()
        return False

    async def left(self) -> None:
        """Wait until the client disconnects. Not beside `gone`."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def find(self, reference: str | None, answer: str | None) -> Model:
        """The model a request names, once it is loaded; answer: what is asked of it, None: what any can do.

        Raises ApiError 400 when it names none or one that cannot answer so, 404 when it is not served, 503 when it
        cannot be loaded now, 408 when that takes longer than the request may.
        """
        if not reference:
            raise ApiError(400, "name a model: `model` in the body, or ?model=… beside a raw body", param="model")
        try:
            while True:  # what was loaded may be evicted before this goes on
                try:
                    model = self.repository.get(reference)
                    break
                except NotLoaded:
                    await self.result(self._load(reference))
        except UnknownModel as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error
        self.model = model
        model.requests += 1
        if answer is not None and answer not in model.answers:
            raise ApiError(400, cannot(model, answer), param="model")
        return model

    async def _load(self, reference: str) -> None:
        """Raises DeadlinePassed, ApiError 503, UnknownModel."""
        try:
            async with asyncio.timeout(self.start + self.timeout - time.perf_counter()):
                await self.repository.load(reference)
        except TimeoutError as error:
            raise DeadlinePassed from error
        except CannotLoad as error:
            headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
            raise ApiError(503, str(error), param="model", code="model_unavailable", headers=headers) from error

    async def answers(self, model: Model, block: Block, wanted: Wanted) -> Any:
        """Queue the rows and wait for what Ticket.future gives."""
        return await self.result(self.submit(model, block, wanted).future)

    def submit(self, model: Model, block: Block, wanted: Wanted, param: str = "input") -> Ticket:
        """Queue the rows; the request is dropped when the client has gone before its turn comes. param: the field that
        the rows come from. Raises ApiError as `begin` does, 429 when the queue is full."""
        self.begin(model, len(block), param)
        if self.caller is not None and model.texts is not None:
            self.caller.spend(sum(map(len, block)))
        try:
            return model.submit(block, wanted, deadline=self.start + self.timeout, gone=self.gone)
        except QueueFull as error:
            raise no_room(model, error) from error

    def begin(self, model: Model, rows: int, param: str) -> None:
        """What is asked is read, and so many rows of it are to be queued. Raises ApiError 400 for more than a queue
        holds."""
        model.decode_seconds.observe(time.perf_counter() - self.start)
        if rows > (limit := self.settings.queue_limit):
            raise ApiError(400, f"{rows} inputs in one request; at most {limit} are taken", param=param)

    async def result(self, answered: Awaitable[T]) -> T:
        """What a queue answers. Raises ApiError 408 past the deadline, 429 where another process had the queue and it
        was full, ClientGone, RunFailed."""
        try:
            return await answered
        except QueueFull as error:
            assert self.model is not None, "its queue was full"
            raise no_room(self.model, error) from error
        except DeadlinePassed as error:
            seconds = self.timeout
            if self.asked_timeout is not None and time.perf_counter() - self.start >= self.asked_timeout:
                seconds = self.asked_timeout
            waited = f"the request waited {seconds:g} s, its deadline, and was dropped"
            raise ApiError(408, waited, code="deadline_exceeded") from error

    async def stream(self, events: AsyncGenerator[bytes, None]) -> None:
        """Send server-sent events as they come. What goes wrong before the first has a status of its own."""
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        async with aclosing(events):
            async for event in events:
                if not self.streaming:
                    self.streaming = True
                    await self.send({"type": "http.response.start", "status": 200, "headers": headers})
                await self.send({"type": "http.response.body", "body": event, "more_body": True})
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def respond(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.streaming:  # its status has been sent: what went wrong is the last event
            event = b"data: " + body + b"\n\n"
            await self.send({"type": "http.response.body", "body": event, "more_body": False})
            return
        pairs = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


async def handle(
    route: str,
    scope: Scope,
    receive: Receive,
    send: Send,
    answer: Callable[[Exchange], Awaitable[bytes | AsyncGenerator[bytes, None]]],
) -> None:
    """Run `answer`, which gives the whole body or the events of a stream, and turn what goes wrong into OpenAI's error
    object."""
    exchange = Exchange(cast(HTTPScope, scope), receive, send)
    headers: dict[str, str] = {}
    body: bytes | None = None
    try:
        exchange.read_headers()
        status, found = 200, await answer(exchange)
        if isinstance(found, bytes):
            body = found
        else:
            await exchange.stream(found)
    except ApiError as error:
        status, body, headers = error.status, error.encoded(), error.headers
    except BadInput as error:
        status, body = 400, ApiError(400, str(error), param="input").encoded()
    except ClientGone:
        status, body = 499, None
    except Exception as error:
        identity = request_id(scope)
        log.error("%s failed, request %s", route, identity, exc_info=error)
        what = "The model failed to run" if isinstance(error, RunFailed) else "The server failed to answer"
        message = f"{what}; the server's log has the cause under request id {identity}."
        status, body = 500, ApiError(500, message, code="internal_error").encoded()
    if (model := exchange.model) is not None:
        model.requests -= 1
    exchange.metrics.requests[route, model.name if model else "", str(status)] += 1
    if body is not None:
        await exchange.respond(status, body, headers)
    if model is not None and status == 200:
        model.request_seconds.observe(time.perf_counter() - exchange.start)


def no_room(model: Model, error: QueueFull) -> ApiError:
    retry = {"retry-after": str(error.retry_after)}
    return ApiError(429, f"{model.name} has no room in its queue; try again", code="queue_full", headers=retry)


def decode_json(body: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        field = re.search(r"`\$\.(\w+)", str(error))
        raise ApiError(400, f"the body: {error}", param=field[1] if field else None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error


def seconds_of(value: bytes) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise ApiError(400, "X-Request-Timeout: a positive number of seconds", param="X-Request-Timeout")
    return seconds


def too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit:,} bytes, the largest this server takes", code="body_too_large"
    )
