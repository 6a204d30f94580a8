"""A front-end: a process that does HTTP for the inference process, which has started it and tells it the rest over one
socket: python -m server.frontends DESCRIPTOR
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
import uvicorn
from litestar.datastructures import State
from litestar.types import ASGIApp

from finetune.jobs.store import JobStore
from server import heap, logs
from server.access import Access, AccessLayer
from server.frontends.app import FrontendApp, routes_of
from server.frontends.control import Control
from server.frontends.link import Link
from server.frontends.listening import listener
from server.frontends.messages import (
    Follows,
    Keys,
    LargeAnswer,
    Loaded,
    Ready,
    Report,
    Serve,
    Settle,
    Stop,
    ToFrontend,
)
from server.frontends.proxy import Proxy
from server.frontends.region import Region, whole
from server.frontends.remote import RemoteRepository
from server.frontends.tally import take
from server.hot_lane import HotLane, Lane
from server.http_config import http_config
from server.keys import KeyStore
from server.metrics import Metrics
from server.request_log import RequestLog
from server.settings import Settings
from server.traces import Traces, traces

log = logging.getLogger("espalier.frontends")

decoder = msgspec.msgpack.Decoder(ToFrontend)


class Server(uvicorn.Server):
    """uvicorn's, saying when it listens."""

    def __init__(self, config: uvicorn.Config, listens: Callable[[], None]) -> None:
        super().__init__(config)
        self.listens = listens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens()


class Frontend:
    """What this process is told, and what it does about it."""

    def __init__(self, end: socket.socket) -> None:
        self.metrics = Metrics()
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.told: asyncio.Queue[Serve | Keys | Loaded] = asyncio.Queue()
        self.lost = self.stopping = False
        self.server: Server | None = None
        self.control = Control(end, decoder, self._received, self._lost)

    async def run(self) -> int:
        """Serve until it is told to stop. Returns the exit status."""
        await self.settled
        serving = asyncio.create_task(self._serve())
        await self.repository.known.wait()
        gc.collect()
        gc.freeze()
        async with keys_of(self.settings, self.access), sending(self.traces):
            if not (self.lost or self.stopping):
                await self._listen()
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
        self._report(0)
        await self.control.sent()
        return 1 if self.lost else 0

    async def _listen(self) -> None:
        config = http_config(
            self.app, self.settings, loop="uvloop", http=partial(HotLane, lane=self.lane), lifespan="off"
        )
        self.server = Server(config, lambda: self.control.send(Ready()))
        await self.server.serve([listener(self.settle.host, self.settle.port)])

    async def _serve(self) -> None:
        """Do as the messages say, one after the other."""
        while True:
            match await self.told.get():
                case Serve() as message:
                    await self.repository.serve(message)
                case Keys(number=number):
                    await self.access.refresh()
                    self.control.send(Follows(number))
                case message:
                    self.repository.loaded(message)

    def _received(self, message: ToFrontend, descriptors: list[int]) -> None:
        match message:
            case Settle():
                self._settle(message, *descriptors)
            case Serve() | Keys() | Loaded():  # what is loaded may have been said to be served just before
                self.told.put_nowait(message)
            case LargeAnswer():
                self.link.answered(whole(*descriptors))
            case Report(number=number):
                self._report(number)
            case Stop():
                self._stop()

    def _settle(self, settle: Settle, region: int, calls_wake: int, answers_wake: int) -> None:
        settings = msgspec.json.decode(settle.settings, type=Settings, dec_hook=lambda kind, found: kind(found))
        logs.configure(settings)
        self.settle, self.settings = settle, settings
        self.link = Link(Region(region), calls_wake, answers_wake, self.control.send)
        os.close(region)
        self.repository = RemoteRepository(self.metrics, self.link, self.control.send)
        self.access = Access(settings, Path(settle.rates))
        self.traces = traces(settings)
        state = {"settings": settings, "metrics": self.metrics, "repository": self.repository}
        routes = routes_of(State({**state, "access": self.access, "traces": self.traces}))
        guarded: ASGIApp = AccessLayer(routes, self.access) if self.access.on else routes
        requests = RequestLog(guarded, settings.slow_seconds, self.traces)
        self.app = FrontendApp(requests, Proxy(settle.socket))
        self.lane = Lane(routes.state, requests)
        self.settled.set_result(None)

    def _report(self, number: int) -> None:
        proxied, self.app.proxied = self.app.proxied, 0
        self.control.send(take(number, self.metrics, self.access, proxied))

    def _stop(self) -> None:
        self.stopping = True
        if self.server is not None:
            self.server.should_exit = True

    def _lost(self) -> None:
        """The inference process has ended without a word: what is open gets a 503, and so does what still comes."""
        log.error("the inference process has ended, and front-ends with it")
        self.lost = True
        if not self.settled.done():
            self.settled.set_exception(ConnectionResetError())
            return
        self.link.lose()
        self._stop()


@asynccontextmanager
async def keys_of(settings: Settings, access: Access) -> AsyncIterator[None]:
    """Who may call is looked up in the database by every process itself."""
    if not access.on:
        yield
        return
    store = await asyncio.to_thread(JobStore, settings.database)
    await access.start(KeyStore(store))
    try:
        yield
    finally:
        await access.stop()
        await asyncio.to_thread(store.close)


@asynccontextmanager
async def sending(traces: Traces | None) -> AsyncIterator[None]:
    if traces is None:
        yield
        return
    traces.start()
    try:
        yield
    finally:
        await traces.stop()


def main(descriptor: int) -> int:
    import uvloop

    async def run() -> int:
        with suppress(ConnectionResetError):
            return await Frontend(socket.socket(fileno=descriptor)).run()
        return 1

    heap.settle()
    # uvicorn raises the signal again once it has stopped in order, which is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    status: int = uvloop.run(run())
    return status
