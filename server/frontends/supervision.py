"""The front-ends as the inference process has them: started, started again when one ends, told what is served, asked
what they have counted, and stopped before it stops itself.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from prometheus_client.core import Metric

from server.access import Access
from server.frontends.control import Control
from server.frontends.engine import Bridge
from server.frontends.listening import reserved
from server.frontends.messages import (
    Counted,
    Follow,
    Following,
    LargeCall,
    Let,
    Load,
    Loaded,
    Ready,
    Report,
    Settle,
    Stop,
    ToEngine,
)
from server.frontends.region import BYTES, Region, shared
from server.frontends.tally import add
from server.metrics import Metrics
from server.runtime.repository import CannotLoad, Repository, UnknownModel
from server.settings import Settings

log = logging.getLogger("espalier.frontends")

decoder = msgspec.msgpack.Decoder(ToEngine)

# What a front-end that is killed has counted since it was last asked is lost.
REPORT_SECONDS = 1.0
# One that takes longer to say what it has counted is left out of an answer to /metrics.
MOST_REPORT_SECONDS = 1.0
# One that ended sooner than this after its start is started again later and later.
SOON_SECONDS = 5.0
MOST_PAUSE = 5.0


class FrontendFailed(Exception):
    """A front-end has ended before it was ready; its own lines say why."""


class Front:
    """One front-end, over all its lives."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.requests = 0
        self.up = False
        self.started = 0.0
        self.failures = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.control: Control[ToEngine] | None = None
        self.bridge: Bridge | None = None


class FrontEnds:
    """All of them. address: host and port that they listen on. In a folder that nobody else may enter are the Unix
    socket of this process's own server (`path`), and what keys may still use (`rates`)."""

    def __init__(self, settings: Settings) -> None:
        """Raises OSError where the address cannot be had."""
        self.settings = settings
        self.kept = reserved(settings.host, settings.port)
        self.address: tuple[str, int] = self.kept.getsockname()[:2]
        self.folder = Path(tempfile.mkdtemp(prefix="espalier-"))
        self.path = str(self.folder / "inference.sock")
        self.rates = self.folder / "rates"
        self.fronts = [Front(number) for number in range(settings.frontends)]
        self.stopping = False
        self.reports: dict[int, tuple[set[int], asyncio.Event]] = {}
        self.numbers = itertools.count(1)
        self.lives: list[asyncio.Task[None]] = []
        self.loads: set[asyncio.Task[None]] = set()

    async def start(self, repository: Repository, metrics: Metrics, access: Access) -> None:
        """Start them, and return when all listen. Raises FrontendFailed."""
        self.repository, self.metrics, self.access = repository, metrics, access
        repository.watchers.append(self._serve)
        repository.followers.append(self.follow)
        metrics.registry.register(self)
        metrics.gather = self.gather
        ready = [asyncio.Event() for _ in self.fronts]
        self.lives = [
            asyncio.create_task(self._live(front, event)) for front, event in zip(self.fronts, ready, strict=True)
        ]
        everyone = asyncio.create_task(all_of(ready))
        await asyncio.wait((everyone, *self.lives), return_when=asyncio.FIRST_COMPLETED)
        if not everyone.done():
            everyone.cancel()
            await self.stop()
            raise FrontendFailed("a front-end did not start")
        self.lives.append(asyncio.create_task(self._ask_again()))

    async def stop(self) -> None:
        """Let them answer what they have; those that take longer than a shutdown may are killed."""
        self.stopping = True
        for front in self.fronts:
            if front.control is not None:
                front.control.send(Stop())
        limit = self.settings.drain_seconds + 2.0
        _, late = await asyncio.wait(self.lives[: len(self.fronts)], timeout=limit)
        for front in self.fronts if late else []:
            if front.process is not None and front.process.poll() is None:
                log.error("front-end %d does not end and is killed", front.number)
                front.process.kill()
        for task in (*self.lives[len(self.fronts) :], *self.loads):
            task.cancel()
        await asyncio.gather(*self.lives, *self.loads, return_exceptions=True)
        self.kept.close()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    async def gather(self) -> None:
        """Have all that was counted until now added to the metrics of this process."""
        await self._all(Report, "say what they have counted")

    async def follow(self) -> None:
        """Wait until all serve what is served here."""
        await self._all(Follow, "say that they serve what is served")

    async def _all(self, message: type[Report] | type[Follow], words: str) -> None:
        """Send it to all that listen, and wait for their answers."""
        asked = {front.number for front in self.fronts if front.up}
        if not asked:
            return
        number, done = next(self.numbers), asyncio.Event()
        self.reports[number] = asked, done
        for front in self.fronts:
            if front.up and front.control is not None:
                front.control.send(message(number))
        try:
            async with asyncio.timeout(MOST_REPORT_SECONDS):
                await done.wait()
        except TimeoutError:
            log.warning("front-ends %s do not %s", sorted(asked), words)
        finally:
            del self.reports[number]

    def _answered(self, front: Front, number: int) -> None:
        if number in self.reports:
            asked, done = self.reports[number]
            asked.discard(front.number)
            if not asked:
                done.set()

    def collect(self) -> Iterator[Metric]:
        """For prometheus-client."""
        requests = Metric("espalier_frontend_requests", "requests that a front-end has taken", "counter")
        up = Metric("espalier_frontend_up", "1 for a front-end that listens, 0 while it is started", "gauge")
        for front in self.fronts:
            labels = {"frontend": str(front.number)}
            requests.add_sample("espalier_frontend_requests_total", labels, front.requests)
            up.add_sample("espalier_frontend_up", labels, int(front.up))
        yield requests
        yield up

    async def _live(self, front: Front, ready: asyncio.Event) -> None:
        """Start a front-end, again and again, until they are to stop. Returns when the first start fails, too."""
        while not self.stopping:
            ended = await self._start(front, ready)
            status = await ended
            if self.stopping or not ready.is_set():
                return
            alive = time.monotonic() - front.started
            front.failures = front.failures + 1 if alive < SOON_SECONDS else 0
            pause = min(MOST_PAUSE, 0.1 * 2**front.failures) if front.failures else 0.0
            log.error("front-end %d has ended with status %s; it is started again", front.number, status)
            await asyncio.sleep(pause)

    async def _start(self, front: Front, ready: asyncio.Event) -> asyncio.Future[int]:
        """A new process. Gives its exit status, once it has one and nothing of it is left here."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "server.frontends", str(theirs.fileno())]
        # In a session of its own a Ctrl-C does not reach it: it stops when this process says so.
        front.process = process = await asyncio.to_thread(
            subprocess.Popen, command, pass_fds=(theirs.fileno(),), start_new_session=True
        )
        theirs.close()
        front.started = time.monotonic()
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        memory = shared("frontend", BYTES)
        calls_wake, answers_wake = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        region = Region(memory)

        def received(message: ToEngine, descriptors: list[int]) -> None:
            self._received(front, control, bridge, ready, message, descriptors)

        def lost() -> None:
            front.up = False
            bridge.close()
            for asked, done in self.reports.values():
                asked.discard(front.number)
                if not asked:
                    done.set()
            waiting = asyncio.create_task(asyncio.to_thread(process.wait))
            waiting.add_done_callback(lambda task: ended.set_result(task.result()))

        control = front.control = Control(ours, decoder, received, lost)
        bridge = front.bridge = Bridge(region, calls_wake, answers_wake, control.send, self.metrics.rejected)
        settings = msgspec.json.encode(self.settings, enc_hook=str)
        control.send(
            Settle(settings, *self.address, self.path, str(self.rates)),
            [memory, os.dup(calls_wake), os.dup(answers_wake)],
        )
        control.send(bridge.serve(self.repository))
        return ended

    def _received(
        self,
        front: Front,
        control: Control[ToEngine],
        bridge: Bridge,
        ready: asyncio.Event,
        message: ToEngine,
        descriptors: list[int],
    ) -> None:
        match message:
            case Ready():
                front.up = True
                ready.set()
            case LargeCall():
                bridge.large_call(message, *descriptors)
            case Let(numbers=numbers):
                bridge.let(numbers)
            case Load():
                task = asyncio.create_task(self._load(control, message))
                self.loads.add(task)
                task.add_done_callback(self.loads.discard)
            case Counted():
                add(message, self.metrics, self.access)
                front.requests += message.proxied + sum(count for _, count in message.counts["requests"])
                self._answered(front, message.number)
            case Following(number=number):
                self._answered(front, number)

    async def _load(self, control: Control[ToEngine], asked: Load) -> None:
        try:
            await self.repository.load(asked.reference)
        except UnknownModel as error:
            control.send(Loaded(asked.number, "UnknownModel", str(error)))
        except CannotLoad as error:
            control.send(Loaded(asked.number, "CannotLoad", str(error), error.retry_after))
        else:
            control.send(Loaded(asked.number))

    def _serve(self) -> None:
        """Tell all what is served now."""
        for front in self.fronts:
            if front.bridge is not None and front.bridge.open and front.control is not None:
                front.control.send(front.bridge.serve(self.repository))

    async def _ask_again(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self.gather()


async def all_of(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        await event.wait()
