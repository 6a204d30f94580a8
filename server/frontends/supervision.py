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
from contextlib import suppress
from pathlib import Path

import msgspec
from prometheus_client.core import Metric

from server.access import Access
from server.frontends.control import Control
from server.frontends.engine import Bridge
from server.frontends.listening import reserved
from server.frontends.messages import (
    Counted,
    Follows,
    Keys,
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
# What was changed by a request is so for the next one, whichever front-end that comes to: for this its answer waits.
MOST_FOLLOW_SECONDS = 2.0
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
        self.follows = 0  # the change that it has followed last
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
        self.change = 0  # of what is served, counted
        self.followed = asyncio.Event()
        self.reports: dict[int, tuple[set[int], asyncio.Event]] = {}
        self.numbers = itertools.count(1)
        self.lives: list[asyncio.Task[None]] = []
        self.loads: set[asyncio.Task[None]] = set()

    async def start(self, repository: Repository, metrics: Metrics, access: Access) -> None:
        """Start them, and return when all listen. Raises FrontendFailed."""
        self.repository, self.metrics, self.access = repository, metrics, access
        self.keys = access.state
        repository.watchers.append(self._serve)
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
        self._tell(Stop())
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

    def behind(self) -> bool:
        """Whether some do not know yet what is served, and to whom."""
        if self.access.on and self.access.state != self.keys:
            self.keys = self.access.state
            self.change += 1
            self._tell(Keys(self.change))
        return any(front.up and front.follows < self.change for front in self.fronts)

    async def settled(self) -> None:
        """Wait until all do."""
        change = self.change
        with suppress(TimeoutError):
            async with asyncio.timeout(MOST_FOLLOW_SECONDS):
                while any(front.up and front.follows < change for front in self.fronts):
                    self.followed.clear()
                    await self.followed.wait()

    async def gather(self) -> None:
        """Have all that was counted until now added to the metrics of this process."""
        asked = {front.number for front in self.fronts if front.up}
        if not asked:
            return
        number, done = next(self.numbers), asyncio.Event()
        self.reports[number] = asked, done
        self._tell(Report(number))
        try:
            async with asyncio.timeout(MOST_REPORT_SECONDS):
                await done.wait()
        except TimeoutError:
            log.warning("front-ends %s do not say what they have counted", sorted(asked))
        finally:
            del self.reports[number]

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

    def _tell(self, message: Keys | Report | Stop) -> None:
        for front in self.fronts:
            if front.control is not None:
                front.control.send(message)

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
            front.up, front.follows = False, 0
            self.followed.set()
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
        control.send(bridge.serve(self.change, self.repository))
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
            case Follows(number=number):
                front.follows = number
                self.followed.set()
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
                if message.number in self.reports:
                    asked, done = self.reports[message.number]
                    asked.discard(front.number)
                    if not asked:
                        done.set()

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
        self.change += 1
        for front in self.fronts:
            if front.bridge is not None and front.bridge.open and front.control is not None:
                front.control.send(front.bridge.serve(self.change, self.repository))

    async def _ask_again(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self.gather()


async def all_of(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        await event.wait()
