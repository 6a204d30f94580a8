"""A loaded model: a verified bundle, its session, its pre- and post-processing and the queue in front of it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np

from export import bundle
from export.bundle import Manifest
from export.processing.inputs import DataInput, ImageInput, LatentInput, SeriesInput, TextInput, VectorInput
from export.processing.series import pad_series
from export.processing.text import TextProcessor, pad
from server.metrics import Metrics
from server.runtime.answers import Answer, answers, generator
from server.runtime.batch_size import worthwhile
from server.runtime.batcher import (
    CPU_PADDING,
    MOST_OF_THE_TIME,
    MOST_PADDING,
    Batcher,
    Block,
    Overloaded,
    Run,
    Ticket,
    Value,
    Wanted,
)
from server.runtime.deployment import Deployment
from server.runtime.generation import Engine
from server.runtime.language import TASK as LANGUAGE
from server.runtime.language import LanguageModel, language_model
from server.runtime.placement import Placement, graph_of, placement
from server.runtime.response_cache import ResponseCache
from server.runtime.session import CPU, Inputs, RunOn, Session, usable
from server.runtime.writer import TASK as TRANSLATION
from server.runtime.writer import Writer, writer
from server.settings import Settings
from server.tensors import signature

# A full batch that is done sooner than this runs on the event loop: handing it over and back costs about as much.
INLINE_SECONDS = 0.001
# So many requests may be open however long they take.
FREELY_OPEN = 16
# Steps of the series a model is timed with, where it reads such long ones.
LONG_SERIES = 4096


@dataclass(frozen=True)
class Loaded:
    """What a thread has prepared, before the event loop puts a queue in front of it. session: of model.onnx; None of a
    language model, whose network `language` holds. images: the session of the graph that makes images, where that is
    another than model.onnx. row_seconds: of a run of one row, where that was measured. most, most_images: rows of a
    batch that are worth it on this CPU; most_padded: places of a padded batch, of texts and series; None where the
    deployment says."""

    manifest: Manifest
    deployment: Deployment
    session: Session | None
    seconds: float
    texts: TextProcessor | None = None
    writer: Writer | None = None
    language: LanguageModel | None = None
    images: Session | None = None
    inline: bool = False
    row_seconds: float = 0.0
    most: int | None = None
    most_padded: int | None = None
    most_images: int | None = None


def load(folder: Path, settings: Settings, deployment: Deployment) -> Loaded:
    """Verify, load and warm up a bundle. Raises DamagedBundle or what the session raises."""
    start = time.perf_counter()
    manifest = bundle.verify(folder)
    texts = None
    if isinstance(manifest.input, TextInput):
        try:
            texts = TextProcessor(manifest.input, (folder / manifest.input.tokenizer).read_bytes())
        except (OSError, ValueError) as error:
            raise bundle.DamagedBundle(f"{folder}: {error}") from error
    if manifest.task in (LANGUAGE, TRANSLATION) and texts is None:
        raise bundle.DamagedBundle(f"{folder}: task {manifest.task}, and an input that is no text")
    if manifest.task == LANGUAGE and texts is not None:
        spoken = language_model(folder, manifest, texts, settings)
        spoken.warm_up()
        return Loaded(manifest, deployment, None, time.perf_counter() - start, texts, language=spoken)
    placed = placement(settings, deployment, manifest)
    session = open_session(folder, manifest, placed, deployment.precision)
    if manifest.task == TRANSLATION and texts is not None:
        written = writer(folder, manifest, session, texts, placed)
        written.warm_up()
        return Loaded(manifest, deployment, session, time.perf_counter() - start, texts, writer=written)
    outputs = [output.name for output in manifest.outputs]
    most = deployment.max_batch_size or manifest.batching.max_batch_size
    blank = partial(_blank, manifest)
    session.warm_up(blank, outputs)
    row_seconds = _seconds(session.run, blank(1), outputs)
    inline = not session.on_device and row_seconds < INLINE_SECONDS
    inline = inline and _seconds(session.run, blank(most), outputs) < INLINE_SECONDS
    worth = places = None
    if not session.on_device and not inline:
        if not deployment.max_batch_size:
            worth = _worthwhile(session, blank, outputs, most)
            if (mask := blank(worth).get("attention_mask")) is not None:
                worth, places = None, mask.size
        session.spread(lambda run: _seconds(run, blank(1), outputs, 2))
    images = most_images = None
    if (made := generator(manifest)) is not None and made.graph != "model":
        images = Session(folder / f"{made.graph}.onnx", placed)
        noise = partial(_noise, made.latent)
        images.warm_up(noise, ["image"])
        if not images.on_device:
            if not deployment.max_batch_size:
                most_images = _worthwhile(images, noise, ["image"], most)
            images.spread(lambda run: _seconds(run, noise(1), ["image"], 2))
    return Loaded(
        manifest,
        deployment,
        session,
        time.perf_counter() - start,
        texts,
        images=images,
        inline=inline,
        row_seconds=row_seconds,
        most=worth,
        most_padded=places,
        most_images=most_images,
    )


def open_session(folder: Path, manifest: Manifest, placed: Placement, precision: str) -> Session:
    """Of the graph that suits the provider. Raises DamagedBundle, and what the session raises."""
    if usable(placed.providers)[0] != CPU:
        session = Session(folder / graph_of(manifest, precision, "cuda"), placed)
        if session.on_device:
            return session
        placed = replace(placed, providers=(CPU,))
    return Session(folder / graph_of(manifest, precision, "cpu"), placed)


def _seconds(run: RunOn, inputs: Inputs, outputs: list[str], runs: int = 5) -> float:
    """What a run takes where nothing else disturbs it: the shortest of some."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run(inputs, outputs)
        times.append(time.perf_counter() - start)
    return min(times)


def _worthwhile(session: Session, blank: Callable[[int], Inputs], outputs: list[str], most: int) -> int:
    return worthwhile(lambda rows: _seconds(session.run, blank(rows), outputs, 1), most)


class Model:
    """One version of one model, ready to answer. It lives for as long as somebody holds it: a request that began
    before a newer version came is answered by this one, and with the last of them its session is freed."""

    def __init__(self, loaded: Loaded, metrics: Metrics, settings: Settings) -> None:
        self.manifest, self.deployment = loaded.manifest, loaded.deployment
        self.name, self.version = loaded.manifest.name, loaded.manifest.version
        self.fingerprint = fingerprint(loaded.manifest)
        self.texts, self.writer, self.language = loaded.texts, loaded.writer, loaded.language
        self.inline = loaded.inline
        self.generator = generator(loaded.manifest)
        self.signature = signature(loaded.manifest)
        self.requests = 0  # that are open
        self.used = time.perf_counter()  # when it was last asked for
        # Told of every request, to ask another version as well.
        self.shadow: Callable[[Ticket, Block, Wanted], None] | None = None
        # Rows that may wait, and seconds that a request may.
        self.queue_limit = loaded.deployment.queue_limit or settings.queue_limit
        self.timeout = loaded.deployment.request_seconds or settings.request_seconds
        labels = (self.name, str(self.version))
        self.decode_seconds = metrics.stages.labels(*labels, "decode")
        self.encode_seconds = metrics.stages.labels(*labels, "encode")
        self.request_seconds = metrics.latency.labels(*labels)
        self.failed_seconds = metrics.failures.labels(*labels)
        # The queue before model.onnx, and that before the graph which makes images where this is another.
        self.batcher: Batcher | None = None
        self.images: Batcher | None = None
        # Whether outputs of the graph itself can be asked for.
        self.raw = loaded.session is not None and loaded.writer is None
        self.engine: Engine | None = None
        self.cache: ResponseCache | None = None
        if (language := loaded.language) is not None:
            self.provider = language.slots.provider
            self.engine = Engine(
                language.slots,
                ends=language.ends,
                text=language.texts.decode,
                queue_limit=self.queue_limit,
                metrics=metrics.generation.of(*labels),
            )
            self.answers = {"complete"} if language.template is None else {"complete", "chat"}
            return
        session = loaded.session
        assert session is not None, "what has no engine has a session"
        self.provider = session.provider
        known = answers(loaded.manifest)

        deployed, batching = loaded.deployment, loaded.manifest.batching
        delay = batching.max_queue_delay_ms if deployed.max_queue_delay_ms is None else deployed.max_queue_delay_ms
        # Nothing that the model has may know the model: one that is retired would wait for the garbage collector, and
        # one that was there at the start is not looked at by it.
        name, rejected, cached = self.name, metrics.rejected, metrics.cache
        runs = metrics.runs[labels]

        def refused(reason: str) -> None:
            rejected[name, reason] += 1

        def counted(event: str) -> None:
            cached[name, event] += 1
            runs.cached[event] += 1

        def batcher(
            run: Run, run_alone: Run | None, parallel: int, worth: int | None, length: Callable[[Any], int] | None
        ) -> Batcher:
            return Batcher(
                run,
                run_alone=run_alone,
                max_batch_size=deployed.max_batch_size or worth or batching.max_batch_size,
                max_queue_delay=delay / 1e3,
                queue_limit=self.queue_limit,
                queue_bytes=settings.queue_bytes,
                parallel=parallel,
                length=length,
                # What is written step by step gains by every sequence that is written along.
                padding=MOST_PADDING if session.on_device or loaded.writer else CPU_PADDING,
                most_padded=loaded.most_padded,
                batches=metrics.batches.labels(*labels),
                queue_seconds=metrics.stages.labels(*labels, "queue"),
                inference_seconds=metrics.stages.labels(*labels, "inference"),
                runs=runs,
                refused=refused,
                preferred=deployed.preferred_batch_sizes,
            )

        self.batcher = batcher(
            _writing(loaded.writer) if loaded.writer else _runner(session.run, loaded.manifest, known),
            None if session.alone is None else _runner(session.run_alone, loaded.manifest, known),
            0 if loaded.inline else session.parallel,
            loaded.most,
            len if isinstance(loaded.manifest.input, TextInput | SeriesInput) else None,
        )
        if loaded.row_seconds:
            self.batcher.run_times.add(1, loaded.row_seconds)
        self.answers = {"complete"} if loaded.writer else set(known)
        if deployed.cache is not None and loaded.writer is None:  # what is written may be drawn anew each time
            self.cache = ResponseCache(deployed.cache.ttl_seconds, deployed.cache.max_bytes, counted)
        if (images := loaded.images) is not None:
            alone = None if images.alone is None else _generating(images.run_alone)
            self.images = batcher(_generating(images.run), alone, images.parallel, loaded.most_images, None)
            self.answers.add("generate")

    @property
    def reads(self) -> DataInput:
        """How its inputs are read; not of a model that takes noise."""
        assert not isinstance(self.manifest.input, LatentInput), "such a model answers nothing that has an input"
        return self.manifest.input

    def submit(
        self,
        block: Block,
        wanted: Wanted,
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        priority: int = 0,
    ) -> Ticket:
        """Have rows answered, at least one: the one door to the session.

        block: of a vector float32 [rows, features], of an image uint8 [rows, height, width, channels], of noise float32
        [rows, latent]; of a text a list of lists of token ids, of a series a list of float32 [steps, channels]; of a
        translation a list of Prompts. wanted: one of `answers`, or, where `raw`, names of outputs of the graph.
        deadline: on time.perf_counter's clock. gone: whether the client has left. priority: in PRIORITIES, higher goes
        first. Raises QueueFull. Not of a model with an engine.
        """
        batcher = self.images if self.images is not None and wanted == "generate" else self.batcher
        assert batcher is not None, "what has an engine takes orders"
        if self.cache is None:
            ticket = batcher.submit(block, wanted, deadline=deadline, gone=gone, priority=priority)
        else:
            ticket = self.cache.submit(
                block, wanted, deadline=deadline, gone=gone, priority=priority, submit=batcher.submit
            )
        self.used = ticket.queued
        if self.shadow is not None:
            self.shadow(ticket, block, wanted)
        return ticket

    def admit(self, left: float, priority: int) -> None:
        """Ask before the input of a request is read, which counts as open already: whether it can be answered in the
        seconds that are left. Raises Overloaded.

        Open requests are read, wait and run: of more than a few there may be as many as would be answered, as of late,
        in the time that this one has.
        """
        if (batcher := self.batcher) is None or self.cache is not None:  # the answer may be there
            return
        batcher.admit(left, priority)
        if self.requests == 1:  # what was measured must not count the time in which there was nothing to do
            batcher.finished = time.perf_counter()
        if self.requests > FREELY_OPEN and priority <= 0:
            rate = batcher.answered.rate()
            if self.requests > MOST_OF_THE_TIME * left * rate:
                batcher.refused("overload")
                raise Overloaded(1, self.requests / rate)

    def admitted(self) -> float:
        """Rows that may wait now, of requests with the usual time."""
        if self.batcher is None:
            return self.queue_limit
        return min(self.queue_limit, MOST_OF_THE_TIME * self.timeout * self.batcher.throughput.rate())

    def cached_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.bytes

    def waiting(self) -> int:
        """Rows that wait for a run, or orders for a slot."""
        if self.engine is not None:
            return self.engine.depth()
        return sum(batcher.depth() for batcher in self._batchers())

    def _batchers(self) -> list[Batcher]:
        return [batcher for batcher in (self.batcher, self.images) if batcher is not None]

    async def close(self) -> None:
        """Wait until the requests that hold this model are answered, then end what it runs on."""
        while self.requests or not all(batcher.idle() for batcher in self._batchers()):  # noqa: ASYNC110 - once
            await asyncio.sleep(0.01)
        if self.engine is not None:
            await self.engine.drain()
            self.engine.close()


def fingerprint(manifest: Manifest) -> str:
    """Of everything that a bundle's answers depend on: equal seeds draw equal texts where this is equal."""
    digests = "".join(f"{name}{digest.sha256}" for name, digest in sorted(manifest.files.items()))
    return f"fp_{hashlib.sha256(digests.encode()).hexdigest()[:12]}"


def _writing(found: Writer) -> Run:
    """Prompts to the candidates of each."""

    def run(blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
        return {"complete": found.decoder.decode(_rows(blocks))}

    return run


def _generating(run_on: RunOn) -> Run:
    """Latent vectors to images."""

    def run(blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
        return {"generate": run_on({"latent": cast(list[np.ndarray], blocks)}, ["image"])[0]}

    return run


def _runner(run_on: RunOn, manifest: Manifest, known: Mapping[str, Answer]) -> Run:
    """Rows to answers: put together or padded, run, and made what was asked for."""
    spec, name = manifest.input, manifest.inputs[0].name

    def run(blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
        inputs: Inputs
        if isinstance(spec, TextInput):
            ids, mask = pad(_rows(blocks), spec.pad_token_id, spec.max_length)
            inputs = {"input_ids": ids, "attention_mask": mask}
        elif isinstance(spec, SeriesInput):
            series, mask = pad_series(_rows(blocks))
            inputs = {"series": series, "attention_mask": mask}
        else:
            inputs = {name: cast(list[np.ndarray], blocks)}
        outputs = sorted({output for one in wanted for output in (known[one].outputs if isinstance(one, str) else one)})
        found = dict(zip(outputs, run_on(inputs, outputs), strict=True))
        return {
            one: known[one].make(found) if isinstance(one, str) else [found[output] for output in one] for one in wanted
        }

    return run


def _rows(blocks: list[Block]) -> list[Any]:
    """Of all blocks, which are lists."""
    return cast(list[Any], blocks[0]) if len(blocks) == 1 else list(chain.from_iterable(blocks))


def _noise(width: int, rows: int) -> dict[str, np.ndarray]:
    return {"latent": np.zeros((rows, width), np.float32)}


def _blank(manifest: Manifest, rows: int) -> dict[str, np.ndarray]:
    """A batch of nothing, to warm up with."""
    match manifest.input:
        case ImageInput(height=height, width=width, channels=channels):
            return {"pixels": np.zeros((rows, height, width, channels), np.uint8)}
        case TextInput(max_length=max_length):
            ones = np.ones((rows, min(max_length, 32)), np.int64)
            return {"input_ids": ones, "attention_mask": ones}
        case VectorInput(features=features):
            return {"vector": np.zeros((rows, features), np.float32)}
        case LatentInput(size=size):
            return _noise(size, rows)
        case SeriesInput(channels=channels, max_length=max_length):
            mask = np.ones((rows, min(max_length, LONG_SERIES)), np.int64)
            return {"series": np.zeros((*mask.shape, channels), np.float32), "attention_mask": mask}
