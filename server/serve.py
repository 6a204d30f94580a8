"""The application on a socket: uvicorn, a line when it is ready, and a shutdown that drains."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from contextlib import suppress
from functools import partial

import uvicorn
from litestar.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE

from server import heap, logs
from server.access import Access, AccessLayer
from server.app import create_app
from server.frontends.proxy import BehindProxy
from server.frontends.supervision import FrontendFailed, FrontEnds
from server.hot_lane import HotLane, Lane
from server.http_config import http_config
from server.process import age_seconds, resident_bytes
from server.request_log import RequestLog
from server.settings import Settings

log = logging.getLogger("espalier.serve")


class Server(uvicorn.Server):
    """uvicorn's server, saying when it is ready, and telling the application first when it is about to stop."""

    def __init__(self, settings: Settings) -> None:
        # With front-ends this process listens where only they can reach it.
        self.frontends = FrontEnds(settings) if settings.frontends else None
        self.application = create_app(settings, self.frontends.rates if self.frontends else None)
        access: Access = self.application.state.access
        guarded: ASGIApp = AccessLayer(self.application, access) if access.on else self.application
        requests = RequestLog(guarded, settings.slow_seconds, self.application.state.traces)
        lane = partial(HotLane, lane=Lane(self.application.state, requests))
        config = http_config(
            BehindProxy(requests, self.frontends.behind, self.frontends.settled) if self.frontends else requests,
            settings,
            host=settings.host,
            port=settings.port,
            uds=self.frontends.path if self.frontends else None,
            loop="asyncio" if sys.platform == "win32" else "uvloop",
            http="httptools" if self.frontends else lane,
            lifespan="on",
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.frontends is not None:
            self.started = False  # not before they listen
            state = self.application.state
            try:
                await self.frontends.start(state.repository, state.metrics, state.access)
            except FrontendFailed as error:
                log.error("%s", error)
                await self.lifespan.shutdown()
                sys.exit(STARTUP_FAILURE)
            self.started = True
        if self.started:
            seconds, megabytes = age_seconds(), resident_bytes() / 1e6
            log.info("ready on %s in %.2f s, %.0f MB resident", self.address(), seconds, megabytes)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Event streams never end by themselves: they must know before uvicorn waits for open responses.
        self.application.state.stopping.set()
        if self.frontends is not None:
            await self.frontends.stop()
        await super().shutdown(sockets)

    def address(self) -> str:
        """Where it listens, e.g. http://127.0.0.1:8000."""
        host, port = self.frontends.address if self.frontends else self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit status."""
    heap.settle()
    logs.configure(settings)
    if settings.frontends and not sys.platform.startswith("linux"):
        log.error("frontends is %d, but front-ends need Linux; leave it at 0 here", settings.frontends)
        return 2
    try:
        server = Server(settings)
    except OSError as error:
        log.error("cannot listen on %s port %d: %s", settings.host, settings.port, error.strerror)
        return 1
    # uvicorn raises the signal again once it has stopped in order, which is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with suppress(KeyboardInterrupt):
        server.run()
    return 0 if server.started else 1
