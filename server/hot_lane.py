"""uvicorn's HTTP protocol with a short way for inference: no ASGI scope, no task, no messages, one write an answer.

A request to one of `hot_routes` over HTTP/1.1 is a `HotExchange`: its body is gathered, its handler's coroutine is
stepped here whenever what it waits for is done, and the whole response is written at once. Everything else (other
routes and methods, HTTP/1.0, forms, Expect: 100-continue, upgrades, what is announced larger than a body may be) goes
the way that uvicorn has for it. Both kinds may follow each other on a connection and are answered in order: a
HotExchange stands where uvicorn has the cycle of a request.

Clients send the same head again and again. A head that httptools has parsed is kept; where the very same bytes begin
the next request, they are not parsed again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from server.access import Access
from server.errors import ApiError
from server.exchange import Body, Exchange, refusal, replied, too_large, whole
from server.hot_routes import HotRoute, hot_route
from server.request_head import Head
from server.request_log import RequestLog
from server.runtime.batcher import ClientGone

log = logging.getLogger("espalier.inference")

# Heads that are kept, and the longest of them in bytes.
MOST_HEADS = 1024
LONGEST_HEAD = 4096
# Of headers with values of their own in every request: such heads are not kept.
NEVER_THE_SAME = {b"x-request-id", b"traceparent", b"idempotency-key", b"date"}
# A body from this size on is not copied out of what came with it.
LARGE_BODY = 16 * 1024
# A server that stops leaves an idle connection open for so long: a request may be on its way.
LINGER_SECONDS = 0.25


class KnownHead(NamedTuple):
    head: Head
    route: HotRoute
    keep_alive: bool


class HotExchange(Exchange):
    """A request in the hot lane. `response_complete`, `disconnected`: as uvicorn's cycle has them. missing: bytes of a
    body of known length that have not come. complete: the body has come."""

    response_complete = False
    disconnected = False
    complete = False
    missing = 0
    received = 0
    problem: ApiError | None = None
    waits: asyncio.Future[Any] | None = None
    coroutine: Coroutine[Any, Any, tuple[int, Body | None]]

    def __init__(self, lane: Lane, known: KnownHead, start: float) -> None:
        super().__init__(lane.shared, start)
        head, self.route, self.keep_alive = known
        self.take(head)
        self.identity = lane.log.identity(head.headers if head.request_id else ())
        self.pieces: list[bytes | memoryview] = []

    @property
    def request_id(self) -> str:
        return self.identity.decode()

    async def buffer(self) -> bytes | memoryview:
        return whole(self.pieces)

    async def body(self) -> bytes:
        found = whole(self.pieces)
        return found if isinstance(found, bytes) else bytes(found)

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield bytes(piece)

    def gone(self) -> bool:
        return self.disconnected

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        self.disconnected = True
        if self.waits is not None:
            self.waits.cancel()

    def let_go(self) -> None:
        """A connection on which nothing is asked holds neither the body of its last request nor the model, which may be
        retired meanwhile."""
        self.pieces.clear()
        self.model = self.ticket = None
        self.orders = ()

    def cancel(self, msg: str | None = None) -> None:
        """As a task's: uvicorn calls it when it waits no longer for open requests."""
        self.leave()


@dataclass
class Lane:
    """What the connections of a server share. state: of the application, with what `exchange.Shared` names once it has
    started."""

    state: Any
    log: RequestLog

    def __post_init__(self) -> None:
        self.heads: dict[bytes, KnownHead] = {}
        self._shared: SimpleNamespace | None = None
        self._default_headers: list[tuple[bytes, bytes]] | None = None
        self._opening = b""

    @property
    def shared(self) -> Any:
        if self._shared is None:
            state = self.state
            self._shared = SimpleNamespace(
                repository=state.repository,
                metrics=state.metrics,
                settings=state.settings,
                access=state.access,
                traces=state.traces,
            )
        return self._shared

    def opening(self, default_headers: list[tuple[bytes, bytes]]) -> bytes:
        """What a response with status 200 begins with; another one once a second, as it says the time."""
        if default_headers is not self._default_headers:
            self._default_headers = default_headers
            self._opening = STATUS_LINE[200] + b"".join(b"%b: %b\r\n" % header for header in default_headers)
        return self._opening

    def keep(self, raw: bytes, known: KnownHead) -> None:
        """Remember what these bytes mean, where they may come again and say where the body ends."""
        head = known.head
        if head.length is None or len(raw) > LONGEST_HEAD or any(name in NEVER_THE_SAME for name, _ in head.headers):
            return
        if len(self.heads) >= MOST_HEADS:
            self.heads.clear()
        self.heads[raw] = known


class HotLane(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        lane: Lane,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.lane = lane
        self.heads = lane.heads
        self.access: Access = lane.shared.access
        self.limit: int = lane.shared.settings.max_body_bytes
        # The request that is being answered; `cycle` is the one whose head came last.
        self.current: HotExchange | RequestResponseCycle | None = None
        # Whose body is taken from the socket without the parser.
        self.gathering: HotExchange | None = None
        self.in_message = False  # that the parser sees
        self.known: KnownHead | None = None  # what the parser has made of the last head
        self.held = False  # until the client reads what was sent before
        self.stopping = False
        self.idle_since = 0.0

    def data_received(self, data: bytes) -> None:
        if self.gathering is not None:
            data = self._gather(self.gathering, data)
        while data and not self.transport.is_closing():
            if (
                self.in_message
                or self.gathering is not None
                or (self.cycle is not None and not self.cycle.response_complete)
                or self.flow.write_paused
            ):
                super().data_received(data)
                return
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                super().data_received(data)
                return
            raw = data[:end]
            known = self.heads.get(raw)
            if known is None:
                data = self._parse_head(raw, data)
                continue
            exchange = self._opened(known)
            missing: int = known.head.length  # type: ignore[assignment]  # heads of bodies in chunks are not kept
            there = len(data) - end
            source = data if there < LARGE_BODY else memoryview(data)
            exchange.pieces.append(source[end : end + missing])
            data = data[end + missing :]
            if there >= missing:
                exchange.complete = True
            else:
                exchange.missing = missing - there
                self.gathering = exchange
            self._begin(exchange)

    def _parse_head(self, raw: bytes, data: bytes) -> bytes:
        """Have the parser read a head, and keep what it means; what follows it."""
        self.known = None
        super().data_received(raw)
        known = cast(KnownHead | None, self.known)
        if known is not None:
            self.lane.keep(raw, known)
        return data[len(raw) :]

    def _gather(self, exchange: HotExchange, data: bytes) -> bytes:
        """Take the rest of a body; what comes behind it."""
        missing = exchange.missing
        if exchange.problem is None:
            exchange.pieces.append(data if len(data) <= missing else data[:missing])
        if len(data) < missing:
            exchange.missing = missing - len(data)
            return b""
        self.gathering = None
        self._completed(exchange)
        return data[missing:]

    # What the parser finds.

    def on_message_begin(self) -> None:
        self.in_message = True
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        known = self._hot()
        if known is None:
            self._leave_to_uvicorn()
            return
        self.known = known
        before = self.cycle
        exchange = self._opened(known)
        if before is None or before.response_complete:
            self._begin(exchange)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft(cast(Any, (exchange, None)))

    def _hot(self) -> KnownHead | None:
        """What the head means that has been parsed; None where uvicorn shall answer."""
        parser = self.parser
        if self.expect_100_continue:
            return None
        path, _, query = self.url.partition(b"?")
        if b"#" in self.url or not path.isascii():
            return None
        route = hot_route(unquote(path.decode("ascii")))
        if route is None or parser.get_http_version() != "1.1" or parser.should_upgrade():
            return None
        try:
            method = parser.get_method().decode("ascii")
            head = Head(method, unquote(path.decode("ascii")), query, self.headers, only=route.method)
        except ApiError:
            return None
        if head.kind == "multipart/form-data" or (head.length is not None and head.length > self.limit):
            return None
        return KnownHead(head, route, parser.should_keep_alive())

    def _leave_to_uvicorn(self) -> None:
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers.extend(headers)
        super().on_headers_complete()
        if self.stopping and isinstance(self.cycle, RequestResponseCycle):
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        exchange = cast(HotExchange | RequestResponseCycle, self.cycle)
        if not isinstance(exchange, HotExchange):
            super().on_body(body)
        elif exchange.problem is None:
            exchange.received += len(body)
            exchange.pieces.append(body)
            if exchange.received > self.limit:
                exchange.pieces.clear()
                exchange.problem = too_large(self.limit)
                exchange.metrics.requests[exchange.route.name, "", "413"] += 1
                if exchange is self.current:
                    self._run(exchange)

    def on_message_complete(self) -> None:
        self.in_message = False
        exchange = cast(HotExchange | RequestResponseCycle, self.cycle)
        if isinstance(exchange, HotExchange):
            self._completed(exchange)
        else:
            super().on_message_complete()

    # From head to answer.

    def _opened(self, known: KnownHead) -> HotExchange:
        exchange = HotExchange(self.lane, known, perf_counter())
        self.cycle = cast(Any, exchange)
        if self.access.on:
            head = known.head
            try:
                exchange.caller = self.access.admit(head.headers, head.method, head.path, self.client)
            except ApiError as error:
                exchange.problem = error
        return exchange

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self.current = cycle
        if isinstance(hot := cast(object, cycle), HotExchange):
            self._begin(hot)
        else:
            super()._start_asgi_task(cycle, app)

    def _begin(self, exchange: HotExchange) -> None:
        """It is this one's turn."""
        self.current = exchange
        if exchange.complete or exchange.problem is not None:
            self._run(exchange)
        else:
            self.flow.resume_reading()

    def _completed(self, exchange: HotExchange) -> None:
        """Its body has come."""
        exchange.complete = True
        if exchange is self.current and exchange.problem is None:
            self._run(exchange)

    def _run(self, exchange: HotExchange) -> None:
        if self.flow.write_paused:
            self.held = True
            return
        if exchange.problem is not None:
            self._refuse(exchange, exchange.problem)
            return
        if self.stopping:
            self.tasks.add(cast(Any, exchange))
        route = exchange.route
        if isinstance(route.answer, bytes):
            self._answer(exchange, 200, route.answer)
            return
        exchange.coroutine = replied(route.name, exchange, route.answer)
        self._step()

    def _refuse(self, exchange: HotExchange, error: ApiError) -> None:
        status, body = refusal(exchange.route.name, exchange, error)
        self._answer(exchange, status, body)

    def _step(self, _: Any = None) -> None:
        """Go on with the handler that is being run, until it waits again."""
        exchange = cast(HotExchange, self.current)
        try:
            coroutine = exchange.coroutine
            waits = coroutine.throw(ClientGone()) if exchange.disconnected else coroutine.send(None)
        except StopIteration as done:
            exchange.waits = None
            self._answer(exchange, *done.value)
        except BaseException as error:
            exchange.waits = None
            exchange.let_go()
            exchange.response_complete = True
            self.tasks.discard(cast(Any, exchange))
            self.transport.close()
            if not isinstance(error, asyncio.CancelledError):
                raise
        else:
            if waits is None:  # asyncio.sleep(0)
                self.loop.call_soon(self._step)
                return
            exchange.waits = waits
            waits._asyncio_future_blocking = False
            waits.add_done_callback(self._step)

    def _answer(self, exchange: HotExchange, status: int, body: Body | None) -> None:
        """Send the response; then it is the next request's turn."""
        exchange.response_complete = True
        self.server_state.total_requests += 1
        if self.stopping:
            self.tasks.discard(cast(Any, exchange))
        transport = self.transport
        if body is None or exchange.disconnected or transport.is_closing():
            exchange.let_go()
            transport.close()
            return
        now = perf_counter()
        self.lane.log.note(
            exchange.head.method, exchange.head.path, status, now - exchange.start, exchange.identity, exchange
        )
        closes = not exchange.keep_alive or (self.stopping and not self.pipeline)
        opening = self.lane.opening(self.server_state.default_headers)
        if status != 200:
            opening = STATUS_LINE[status] + opening[len(STATUS_LINE[200]) :]
        more = b""
        if exchange.caller is not None and exchange.caller.limited:
            exchange.more_headers += exchange.caller.headers()
        for header in exchange.more_headers:
            more += b"%b: %b\r\n" % header
        closing = b"connection: close\r\n" if closes else b""
        if isinstance(body, bytes):
            transport.write(
                b"%bcontent-type: %b\r\ncontent-length: %d\r\n%bx-request-id: %b\r\n%b\r\n%b"
                % (opening, exchange.answer_type, len(body), more, exchange.identity, closing, body)
            )
        else:
            head = b"%bcontent-type: %b\r\ncontent-length: %d\r\n%bx-request-id: %b\r\n%b\r\n" % (
                *(opening, exchange.answer_type, sum(map(len, body)), more, exchange.identity, closing),
            )
            transport.writelines([head, *body])
        exchange.let_go()
        if closes:
            transport.close()
            return
        if self.pipeline:
            self.loop.call_soon(self._next)
            return
        self.flow.resume_reading()
        self.idle_since = now
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _next(self) -> None:
        if self.pipeline and not self.transport.is_closing():
            self._start_asgi_task(*self.pipeline.pop())

    def on_response_complete(self) -> None:
        self.idle_since = perf_counter()
        super().on_response_complete()

    # What becomes of the connection.

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.held:
            self.held = False
            if isinstance(self.current, HotExchange) and not self.transport.is_closing():
                self._run(self.current)

    def timeout_keep_alive_handler(self) -> None:
        """Requests come and go without setting the timer anew: when it is up, how long nothing came is looked at."""
        self.timeout_keep_alive_task = None
        if self._busy() or self.in_message:
            return
        left = self.idle_since + self.timeout_keep_alive - perf_counter()
        if left > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        current = self.current
        if isinstance(current, HotExchange):
            if not current.response_complete:
                if not current.complete:
                    current.metrics.requests[current.route.name, "", "499"] += 1
                current.leave()
        elif current is not None and not current.response_complete:
            current.disconnected = True
            current.message_event.set()
        self.gathering = None
        self.pipeline.clear()
        if isinstance(cast(object, self.cycle), HotExchange):
            self.cycle = cast(Any, None)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """What has begun to come is answered, and the connection closed with the last answer."""
        self.stopping = True
        if isinstance(self.cycle, RequestResponseCycle):
            self.cycle.keep_alive = False
        if isinstance(self.current, HotExchange) and not self.current.response_complete:
            self.tasks.add(cast(Any, self.current))
        self.loop.call_later(LINGER_SECONDS, self._close_idle)

    def _busy(self) -> bool:
        """Whether a request has come, at least its head, and is not answered."""
        return self.gathering is not None or (self.cycle is not None and not self.cycle.response_complete)

    def _close_idle(self) -> None:
        if not self._busy():
            self.transport.close()
