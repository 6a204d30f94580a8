"""One request to a hot inference route: what is read of it, which model it names, how it is answered.

The routes are bare ASGI handlers mounted in the Litestar application, for speed; everything else about them (errors,
OpenAPI, metrics) is as with the typed ones. On our own server most do not even come that way: server.hot_lane makes an
exchange of what the parser finds, and the same handler answers it.

X-Request-Timeout (seconds) drops a request that has waited longer, with a 408; one that writes a text, where it is not
done by then.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar, cast

import msgspec
from litestar.types import HTTPDisconnectEvent, HTTPRequestEvent, HTTPScope, Receive, Scope, Send

from export.processing.inputs import BadInput
from server.access import Caller
from server.errors import ApiError, body_at, request_id
from server.metrics import Metrics
from server.request_head import Head, Headers, session_of
from server.runtime import orders
from server.runtime.batcher import Block, ClientGone, DeadlinePassed, Overloaded, QueueFull, RunFailed, Ticket, Wanted
from server.runtime.model import Model
from server.runtime.repository import CannotLoad, NotLoaded, Repository, UnknownModel
from server.settings import Settings
from server.traces import Answered, Ran, Traces

log = logging.getLogger("espalier.inference")

encoder = msgspec.json.Encoder()

# How often a request looks whether a model that was published just now is served.
LOOK_SECONDS = 0.02

T = TypeVar("T")
E = TypeVar("E", bound="Exchange")


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


# What a route answers: a body, or its parts in order, which are sent without being put together.
Body = bytes | list[bytes | memoryview]


class Shared(Protocol):
    """What all requests share; the application's state is one."""

    repository: Repository
    metrics: Metrics
    settings: Settings
    traces: Traces | None


class Exchange(ABC):
    """One request: its head, where its body comes from, and what has been seen of it. answer_type, more_headers: what
    the answer is to have, beside its length. ticket, orders: what it waits for, of a batcher or of an engine."""

    caller: Caller | None = None
    model: Model | None = None
    ticket: Ticket | None = None
    orders: Sequence[orders.Ticket] = ()
    answer_type = b"application/json"

    def __init__(self, shared: Shared, start: float) -> None:
        """start: on time.perf_counter's clock."""
        self.head: Head
        self.repository, self.metrics, self.settings = shared.repository, shared.metrics, shared.settings
        self.traces = shared.traces
        self.start = start
        self.more_headers: list[tuple[bytes, bytes]] = []
        # In how many seconds it must have begun; and in how many it must be done, where the client has said so.
        self.timeout = self.settings.request_seconds
        self.asked_timeout: float | None = None
        self.priority = 0

    def take(self, head: Head) -> None:
        self.head = head
        if head.timeout is not None:
            self.asked_timeout = head.timeout
            self.timeout = min(self.timeout, head.timeout)
        self.priority = head.priority

    @property
    def path(self) -> str:
        return self.head.path

    @property
    def headers(self) -> Headers:
        return self.head.headers

    @property
    @abstractmethod
    def request_id(self) -> str: ...

    @abstractmethod
    async def buffer(self) -> bytes | memoryview:
        """The whole body, where it lies. Raises ApiError 413 beyond the limit, ClientGone, and ApiError 400 when it is
        empty."""

    @abstractmethod
    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ApiError 413, ClientGone."""

    @abstractmethod
    def gone(self) -> bool:
        """Whether the client has disconnected."""

    async def body(self) -> bytes:
        """As `buffer`."""
        found = await self.buffer()
        return found if isinstance(found, bytes) else bytes(found)

    async def find(self, reference: str | None, answer: str | None) -> Model:
        """The model a request names, once it is loaded; answer: what is asked of it, None: what any can do.

        Raises ApiError 400 when it names none or one that cannot answer so, 404 when it is not served, 429 when it
        would not answer in time, 503 when it cannot be loaded now, 408 when that takes longer than the request may.
        """
        if not reference:
            raise ApiError(400, "name a model: `model` in the body, or ?model=… beside a raw body", param="model")
        try:
            while True:  # what was loaded may be evicted before this goes on
                try:
                    model = self.repository.get(reference, self.session)
                    break
                except NotLoaded:
                    await self.result(asyncio.create_task(self._load(reference)))
                except UnknownModel:
                    if not self._is_coming(reference):
                        raise
                    await asyncio.sleep(LOOK_SECONDS)
        except UnknownModel as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error
        self.model = model
        model.requests += 1
        if answer is not None and answer not in model.answers:
            raise ApiError(400, cannot(model, answer), param="model")
        self.timeout = model.timeout if self.asked_timeout is None else min(model.timeout, self.asked_timeout)
        try:
            model.admit(self.start + self.timeout - time.perf_counter(), self.priority)
        except QueueFull as error:
            raise no_room(model, error) from error
        return model

    def _is_coming(self, reference: str) -> bool:
        """Whether a model was published just now and will be served within the time of this request. A job says that it
        has succeeded as soon as its model is published; what lies on object storage is not looked for."""
        late = time.perf_counter() >= self.start + self.timeout
        return (
            not late
            and not self.settings.repository_url
            and self.repository.unseen(reference, self.settings.repository)
        )

    def session(self) -> str | None:
        """The id of the session that a request is of, where it says so: its requests go to one version."""
        return session_of(self.headers)

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
        """Queue the rows and wait for what Ticket.future gives. Raises as `submit` and `result` do."""
        try:
            return await self.submit(model, block, wanted).future
        except (DeadlinePassed, QueueFull) as error:
            raise self.unanswered(error) from error

    def submit(self, model: Model, block: Block, wanted: Wanted, param: str = "input") -> Ticket:
        """Queue the rows; the request is dropped when the client has gone before its turn comes. param: the field that
        the rows come from. Raises ApiError as `begin` does, 429 when the queue is full."""
        self.begin(model, len(block), param)
        if self.caller is not None and model.texts is not None:
            self.caller.spend(sum(map(len, block)))
        try:
            ticket = model.submit(
                block, wanted, deadline=self.start + self.timeout, gone=self.gone, priority=self.priority
            )
        except QueueFull as error:
            raise no_room(model, error) from error
        self.ticket = ticket
        return ticket

    def begin(self, model: Model, rows: int, param: str) -> None:
        """What is asked is read, and so many rows of it are to be queued. Raises ApiError 400 for more than a queue
        holds."""
        model.decode_seconds.observe(time.perf_counter() - self.start)
        if rows > (limit := model.queue_limit):
            raise ApiError(400, f"{rows} inputs in one request; at most {limit} are taken", param=param)

    async def result(self, answered: Awaitable[T]) -> T:
        """What a queue answers. Raises ApiError 408 past the deadline, 429 for one that took its room, ClientGone,
        RunFailed."""
        try:
            return await answered
        except (DeadlinePassed, QueueFull) as error:
            raise self.unanswered(error) from error

    def unanswered(self, error: DeadlinePassed | QueueFull) -> ApiError:
        """What a client is told of that."""
        if isinstance(error, QueueFull):
            assert self.model is not None, "whoever waits for one has found it"
            return no_room(self.model, error)
        seconds = self.timeout
        if self.asked_timeout is not None and time.perf_counter() - self.start >= self.asked_timeout:
            seconds = self.asked_timeout
        waited = f"the request waited {seconds:g} s, its deadline, and was dropped"
        return ApiError(408, waited, code="deadline_exceeded")


class AsgiExchange(Exchange):
    """A request that came as ASGI has it."""

    def __init__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        super().__init__(scope["litestar_app"].state, time.perf_counter())
        self.scope, self.receive, self.send = scope, receive, send
        self.caller = scope.get("state", {}).get("caller")
        self.received = 0
        self.streaming = False

    def read_head(self) -> None:
        """Raises as `Head` does."""
        scope = self.scope
        self.take(Head(scope["method"], scope["path"], scope["query_string"], list(scope["headers"])))

    @property
    def request_id(self) -> str:
        return request_id(self.scope)

    async def find(self, reference: str | None, answer: str | None) -> Model:
        model = await super().find(reference, answer)
        self.scope.setdefault("state", {})["model"] = model.name, model.version  # for lines of the log
        return model

    async def piece(self) -> tuple[bytes, bool]:
        """The next part of the body, and whether more comes. Raises ApiError 413 beyond the limit, ClientGone."""
        limit = self.settings.max_body_bytes
        if self.head.length is not None and self.head.length > limit:
            raise too_large(limit)
        message = cast(HTTPRequestEvent | HTTPDisconnectEvent, await self.receive())
        if message["type"] == "http.disconnect":
            raise ClientGone
        self.received += len(message["body"])
        if self.received > limit:
            raise too_large(limit)
        return message["body"], message["more_body"]

    async def chunks(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            body, more = await self.piece()
            yield body

    async def buffer(self) -> bytes | memoryview:
        return whole([piece async for piece in self.chunks()])

    def gone(self) -> bool:
        # `receive` is asked, and left again where it begins to wait.
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

    async def respond(self, status: int, body: Body) -> None:
        parts = [body] if isinstance(body, bytes) else body
        if self.streaming:  # its status has been sent: what went wrong is the last event
            event = b"".join([b"data: ", *parts, b"\n\n"])
            await self.send({"type": "http.response.body", "body": event, "more_body": False})
            return
        headers = [
            (b"content-type", self.answer_type),
            (b"content-length", b"%d" % sum(map(len, parts))),
            *self.more_headers,
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        for i, part in enumerate(parts, 1):
            await self.send({"type": "http.response.body", "body": bytes(part), "more_body": i < len(parts)})


async def handle(
    route: str,
    scope: Scope,
    receive: Receive,
    send: Send,
    answer: Callable[[AsgiExchange], Awaitable[Body | AsyncGenerator[bytes, None]]],
) -> None:
    """Answer a request with what `answer` gives: the whole body, or the events of a stream."""

    async def answered(exchange: AsgiExchange) -> Body | None:
        exchange.read_head()
        found = await answer(exchange)
        if isinstance(found, bytes | list):
            return found
        await exchange.stream(found)
        return None

    exchange = AsgiExchange(cast(HTTPScope, scope), receive, send)
    scope.setdefault("state", {})["traced"] = True  # here, if at all
    status, body = await replied(route, exchange, answered)
    if body is not None:
        await exchange.respond(status, body)


async def replied(
    route: str, exchange: E, answer: Callable[[E], Coroutine[Any, Any, Body | None]]
) -> tuple[int, Body | None]:
    """The status and the body that are sent, None where nothing is left to send: what `answer` gives, or what went
    wrong as an error object. Counts the request."""
    body: Body | None = None
    try:
        status, body = 200, await answer(exchange)
    except ApiError as error:
        status, body = refusal(route, exchange, error)
    except BadInput as error:
        status, body = refusal(route, exchange, ApiError(400, str(error), param="input"))
    except ClientGone:
        status = 499
    except Exception as error:
        identity = exchange.request_id
        log.error("%s failed, request %s", route, identity, exc_info=error, extra={"request": about(exchange)})
        what = "The model failed to run" if isinstance(error, RunFailed) else "The server failed to answer"
        message = f"{what}; the server's log has the cause under request id {identity}."
        status, body = refusal(route, exchange, ApiError(500, message, code="internal_error"))
    finally:
        if (model := exchange.model) is not None:
            model.requests -= 1
    exchange.metrics.requests[route, model.name if model is not None else "", str(status)] += 1
    end = time.perf_counter()
    exemplar = None if exchange.traces is None else traced(exchange, exchange.traces, route, status, end)
    if model is not None:
        spent = model.request_seconds if status == 200 else model.failed_seconds
        spent.observe(end - exchange.start, exemplar)
    # It knows the exchange, to see whether the client has gone: the two would wait for the garbage collector.
    exchange.ticket = None
    return status, body


def about(exchange: Exchange) -> dict[str, Any]:
    """What lines of the log say of a request, as server.logs.told takes it."""
    model = exchange.model
    of_model = None if model is None else (model.name, model.version)
    return {"request_id": exchange.request_id, "caller": exchange.caller, "model": of_model}


def traced(exchange: Exchange, traces: Traces, route: str, status: int, end: float) -> dict[str, str] | None:
    """Trace a request, if it is to be, and have the histograms of what it waited for point at it. Its exemplar."""
    if not hasattr(exchange, "head") or (origin := traces.origin(exchange.headers)) is None:
        return None  # of a head that could not be read, too
    model, ticket = exchange.model, exchange.ticket
    answered = Answered(
        origin,
        exchange.head.method,
        route,
        status,
        exchange.start,
        end,
        exchange.request_id,
        exchange.caller.id if exchange.caller else None,
        model.name if model else None,
        model.version if model else None,
        model.provider if model else None,
        [] if ticket is None else [ran(ticket)],
        [stream.times for order in exchange.orders for stream in order.streams],
    )
    exemplar = traces.add(answered)
    if status == 200:
        exchange.metrics.point_at(answered, exemplar)
    return exemplar


def ran(ticket: Ticket) -> Ran:
    return Ran(ticket.queued, ticket.started, ticket.finished, ticket.inference, ticket.rows, ticket.batch_rows)


def refusal(route: str, exchange: Exchange, error: ApiError) -> tuple[int, bytes]:
    """Status and body of an error; its headers take the place of what the answer was to have."""
    exchange.answer_type = Exchange.answer_type
    exchange.more_headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    return error.status, body_at(route, error)


def whole(pieces: Sequence[bytes | memoryview]) -> bytes | memoryview:
    """The body that came in pieces. Raises ApiError 400 when it is empty."""
    found = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if not found:
        raise ApiError(400, "the body is empty; send JSON, a form or the bytes of an input")
    return found


def no_room(model: Model, error: QueueFull) -> ApiError:
    retry, code = (
        {"retry-after": str(error.retry_after)},
        "overloaded" if isinstance(error, Overloaded) else "queue_full",
    )
    return ApiError(429, f"{model.name} {error}; try again", code=code, headers=retry)


def decode_json(body: bytes | memoryview, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        field = re.search(r"`\$\.(\w+)", str(error))
        raise ApiError(400, f"the body: {error}", param=field[1] if field else None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error


def too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit:,} bytes, the largest this server takes", code="body_too_large"
    )
