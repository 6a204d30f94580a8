"""The models as a front-end has them: what they are is known here, their rows go to the inference process.

Of a model with several outputs only arrays cross; what is made of them for an answer is made here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from export.bundle import Manifest
from export.processing.inputs import TextInput
from export.processing.text import TextProcessor
from server.frontends.blocks import Layout, latent, layout
from server.frontends.messages import ALL, GENERATE, Follows, Let, Load, Loaded, Offer, Serve
from server.metrics import Metrics
from server.runtime.answers import answers, generator
from server.runtime.batcher import MOST_OF_THE_TIME, Block, Lane, Overloaded, Ticket, Wanted, seconds_to_wait
from server.runtime.model import Model, fingerprint
from server.runtime.references import References
from server.runtime.repository import CannotLoad, NotLoaded, UnknownModel
from server.runtime.throughput import Throughput
from server.tensors import signature

if TYPE_CHECKING:
    from server.frontends.link import Link

log = logging.getLogger("espalier.frontends")

LANE = Lane(0)  # tickets here are in no queue
# What the inference process said of its queue holds for so long.
SAID_SECONDS = 0.1
MOST_PLANS = 1000


class Plan(NamedTuple):
    """code: of Call.wanted. layout: of the rows. crossed: outputs of the graph whose arrays come, none where it is that
    of the answer itself."""

    code: int
    layout: Layout
    crossed: list[str]


class RemoteModel(Model):
    """What routes ask of a Model, for one that runs in the inference process."""

    def __init__(self, offer: Offer, link: Link, metrics: Metrics) -> None:
        """Reads the tokenizer, which may take a while. Raises what goes wrong with that."""
        self.number, self.link = offer.number, link
        self.most_rows, self.freely, self.queue_limit = offer.most_rows, offer.freely, offer.queue_limit
        self.cached = offer.cached
        self.timeout, self.provider = offer.timeout, offer.provider
        self.manifest = msgspec.json.decode(offer.manifest, type=Manifest)
        self.name, self.version = self.manifest.name, self.manifest.version
        self.fingerprint = fingerprint(self.manifest)
        self.texts = None
        if offer.raw and isinstance(self.manifest.input, TextInput):
            file = Path(offer.folder) / self.manifest.input.tokenizer
            self.texts = TextProcessor(self.manifest.input, file.read_bytes())
        self.engine = self.writer = self.language = None
        self.generator, self.signature = generator(self.manifest), signature(self.manifest)
        self.answers, self.raw = set(offer.answers), offer.raw
        self.requests = 0
        labels = (self.name, str(self.version))
        self.decode_seconds = metrics.stages.labels(*labels, "decode")
        self.encode_seconds = metrics.stages.labels(*labels, "encode")
        self.queue_seconds = metrics.stages.labels(*labels, "queue")
        self.request_seconds, self.failed_seconds = metrics.latency.labels(*labels), metrics.failures.labels(*labels)
        self.rejected = metrics.rejected
        self.throughput = Throughput()  # in requests
        self.finished = time.perf_counter()  # the last answer
        self.wait = 0.0  # that the queue had then
        self.most_calls, self.flying = offer.most_calls, 0
        self.plans: dict[Wanted, Plan] = {}
        self.known = answers(self.manifest)
        self.layout = layout(self.manifest)
        self.places = {output.name: place for place, output in enumerate(self.manifest.outputs)}

    def submit(
        self,
        block: Block,
        wanted: Wanted,
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        priority: int = 0,
    ) -> Ticket:
        """As Model.submit; that a queue is full is said by the future."""
        ticket = Ticket(self.link.loop.create_future(), block, wanted, deadline, gone, priority, LANE, 0)
        self.link.submit(self, ticket, priority)
        return ticket

    def admit(self, left: float, priority: int) -> None:
        """As Model.admit, by what is open here and what was last said of the queue there."""
        if self.cached or priority > 0:  # the answer may be there
            return
        late = self.wait > max(0.0, MOST_OF_THE_TIME * left) and time.perf_counter() - self.finished < SAID_SECONDS
        if late or self.requests > self.freely:
            rate = self.throughput.rate()
            if late or self.requests > max(self.freely, MOST_OF_THE_TIME * left * rate):
                self.rejected[self.name, "overload"] += 1
                wait = self.wait if late else self.requests / rate
                raise Overloaded(seconds_to_wait(wait), wait)

    def told(self, requests: int, wait: float) -> None:
        """So many were answered; one that comes now would wait for so many seconds."""
        now = time.perf_counter()
        self.throughput.add(requests, now - self.finished)
        self.finished, self.wait = now, wait

    def plan(self, wanted: Wanted) -> Plan:
        """How it crosses."""
        if (found := self.plans.get(wanted)) is None:
            if len(self.plans) >= MOST_PLANS:  # clients name outputs in many orders
                self.plans.clear()
            found = self.plans[wanted] = self._plan(wanted)
        return found

    def _plan(self, wanted: Wanted) -> Plan:
        outputs = wanted
        if isinstance(wanted, str):
            if wanted not in self.known:
                assert self.generator is not None, "what generates has a generator"
                return Plan(GENERATE, latent(self.generator.latent), [])
            outputs = self.known[wanted].outputs
        places = {self.places[output] for output in outputs}
        if max(places) >= ALL.bit_length() - 1:
            return Plan(ALL, self.layout, list(self.places))
        crossed = [output for output, place in self.places.items() if place in places]
        return Plan(sum(1 << place for place in places), self.layout, crossed)

    def value(self, wanted: Wanted, arrays: list[np.ndarray]) -> Any:
        """What Ticket.future gives, of the arrays that have crossed for `wanted`."""
        crossed = self.plan(wanted).crossed
        if not crossed:
            return arrays[0]
        found = dict(zip(crossed, arrays, strict=True))
        if isinstance(wanted, str):
            return self.known[wanted].make(found)
        return [found[output] for output in wanted]

    def waiting(self) -> int:
        return 0

    async def close(self) -> None:
        pass


class RemoteRepository(References):
    """What the inference process serves, as far as it has told. known: whether it has told anything yet."""

    def __init__(self, metrics: Metrics, link: Link, send: Callable[[Follows | Let | Load], None]) -> None:
        super().__init__()
        self.metrics, self.link, self.send = metrics, link, send
        self.known = asyncio.Event()
        self.numbered: dict[int, RemoteModel] = {}
        self.loading: dict[int, asyncio.Future[None]] = {}
        self.numbers = itertools.count(1)
        self.retiring: set[asyncio.Task[None]] = set()

    async def serve(self, message: Serve) -> None:
        """Serve this from now on."""
        for offer in message.new:
            try:
                model = await asyncio.to_thread(RemoteModel, offer, self.link, self.metrics)
            except (OSError, ValueError) as error:
                log.error("%s cannot be served by this front-end: %s", offer.folder, error)
                self.send(Let([offer.number]))
            else:
                self.numbered[offer.number] = model
        for name in self.views.keys() - message.names.keys():
            self.show(name, None, {})
        asked: set[int] = set()
        for name, meaning in message.names.items():
            asked.update(meaning.ready.values())
            ready = {version: self.numbered[n] for version, n in meaning.ready.items() if n in self.numbered}
            self.show(name, meaning.view, dict(ready))
        for number in self.numbered.keys() - asked:
            task = asyncio.create_task(self._let(self.numbered.pop(number)))
            self.retiring.add(task)
            task.add_done_callback(self.retiring.discard)
        self.send(Follows(message.number))
        self.known.set()

    async def _let(self, model: RemoteModel) -> None:
        """Once nothing that is open needs it."""
        while model.requests:  # noqa: ASYNC110 - once a model
            await asyncio.sleep(0.01)
        self.send(Let([model.number]))

    async def load(self, reference: str) -> Model:
        """As Repository.load, there."""
        number = next(self.numbers)
        self.loading[number] = asyncio.get_running_loop().create_future()
        self.send(Load(number, reference))
        await self.loading[number]
        try:
            return self.get(reference)
        except NotLoaded as error:
            raise CannotLoad(f"{reference} was loaded and is not here any more", retry_after=1) from error

    def loaded(self, message: Loaded) -> None:
        waiting = self.loading.pop(message.number)
        if waiting.done():  # cancelled
            return
        match message.error:
            case "":
                waiting.set_result(None)
            case "UnknownModel":
                waiting.set_exception(UnknownModel(message.message))
            case _:
                waiting.set_exception(CannotLoad(message.message, message.retry_after))
