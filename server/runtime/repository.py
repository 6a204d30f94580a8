"""Which models are served: the newest whole version of every name in the repository folder.

The folder is looked through every second or so. A new version is verified, loaded and warmed up in a thread while the
old one answers; then one assignment makes it the one that new requests get. A damaged version is refused and the one
before goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from export import bundle
from server.metrics import Metrics
from server.runtime.deployment import read
from server.runtime.model import Loaded, Model, load
from server.settings import Settings

log = logging.getLogger("espalier.repository")


class UnknownModel(LookupError):
    """No such model, or not this version of it; the message lists what is served."""


class NotLoaded(LookupError):
    """The model is there, and loaded when it is asked for: await `Repository.load(reference)`."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"{reference} is not loaded")
        self.reference = reference


class CannotLoad(Exception):
    """The version is there and did not load, or has no room; the message says why. retry_after: seconds until it may
    have, None where asking again does not help."""

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Entry:
    """One version in the repository. state: "ready", "loading", "unloading" (answers what it holds), or "unavailable"
    for the `reason`."""

    name: str
    version: int
    state: Literal["ready", "loading", "unloading", "unavailable"]
    reason: str = ""


class Repository:
    """`models`: what is served, by name."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.folder = settings.repository
        self.settings = settings
        self.metrics = metrics
        self.models: dict[str, Model] = {}
        # Called when what is served has changed.
        self.watchers: list[Callable[[], None]] = []
        # Versions that would not load, with their manifest's time of change: tried again when that is another.
        self.refused: dict[tuple[str, int], float] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.unloaded: set[str] = set()
        self.task: asyncio.Task[None] | None = None
        # Versions that are no longer served, while their last requests are answered.
        self.retiring: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load what there is, then go on looking."""
        self.folder.mkdir(parents=True, exist_ok=True)
        await self.refresh()
        self.task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stop looking, and wait until what was asked is answered."""
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task
        await asyncio.gather(*(model.close() for model in self.models.values()), *self.retiring)

    def get(self, reference: str) -> Model:
        """The model served as "name" or "name:version". Raises UnknownModel."""
        model = self.models.get(reference)
        if model is not None:
            return model
        name, _, version = reference.partition(":")
        model = self.models.get(name)
        if model is None:
            served = ", ".join(sorted(self.models)) or "none yet"
            raise UnknownModel(f"no model {name!r} is served; served are: {served}")
        if version != str(model.version):
            raise UnknownModel(f"version {version!r} of {name} is not loaded; version {model.version} is served")
        return model

    async def load(self, reference: str) -> Model:
        """Load "name" or "name:version" now, and again where it was unloaded. Raises UnknownModel, CannotLoad."""
        name = reference.partition(":")[0]
        self.unloaded.discard(name)
        for key in [key for key in self.refused if key[0] == name]:
            del self.refused[key]
        await self.refresh()
        reasons = [reason for (refused, _), reason in self.reasons.items() if refused == name]
        if name not in self.models and reasons:
            raise CannotLoad(reasons[0])
        return self.get(reference)

    async def unload(self, name: str, version: int | None = None) -> None:
        """Serve a model no more, until it is loaded again or the server starts anew. Returns when what it held is
        answered. Raises UnknownModel."""
        model = self.get(name if version is None else f"{name}:{version}")
        self.unloaded.add(name)
        del self.models[name]
        await self._retire(model)

    def index(self) -> list[Entry]:
        """What is in the repository, by name and version."""
        ready = [Entry(name, model.version, "ready") for name, model in self.models.items()]
        refused = [Entry(*key, "unavailable", reason) for key, reason in self.reasons.items()]
        return sorted(ready + refused, key=lambda entry: (entry.name, entry.version))

    async def refresh(self) -> None:
        """Bring what is served in line with the folder."""
        there = await asyncio.to_thread(_listing, self.folder)
        for name in self.models.keys() - there.keys():
            self._retire(self.models.pop(name))
            log.info("%s is gone from the repository and served no more", name)
        for name in there.keys() - self.unloaded:
            versions = there[name]
            await self._refresh_model(name, versions)

    async def _refresh_model(self, name: str, versions: list[tuple[int, float]]) -> None:
        """Serve the newest of `versions` (number and time of change, newest first) that loads."""
        old = self.models.get(name)
        for version, changed in versions:
            if old is not None and version == old.version:
                return
            if self.refused.get((name, version)) == changed:
                continue
            try:
                deployment = await asyncio.to_thread(read, self.folder / name)
                loaded = await asyncio.to_thread(load, self.folder / name / str(version), self.settings, deployment)
            except Exception as error:  # a graph that ONNX Runtime cannot load raises any of its own classes
                self.refused[name, version] = changed
                self.reasons[name, version] = str(error)
                self.metrics.refused.labels(name).inc()
                log.error("%s version %d is refused: %s", name, version, error)
                continue
            self.reasons.pop((name, version), None)
            self._serve(name, loaded, old)
            return
        if old is not None and old.version not in [version for version, _ in versions]:
            self._retire(self.models.pop(name))

    def _serve(self, name: str, loaded: Loaded, old: Model | None) -> None:
        if old is not None:
            self._retire(old)
        model = Model(loaded, self.metrics, self.settings)
        self.models[name] = model
        labels = (name, str(model.version))
        self.metrics.model_info.labels(*labels, model.manifest.task, model.provider).set(1)
        self.metrics.load_seconds.labels(*labels).set(loaded.seconds)
        self.metrics.queue[labels], self.metrics.admitted[labels] = model.waiting, model.admitted
        for watcher in self.watchers:
            watcher()
        log.info("serving %s version %d on %s, loaded in %.2f s", name, model.version, model.provider, loaded.seconds)

    def _retire(self, model: Model) -> asyncio.Task[None]:
        task = asyncio.create_task(model.close())
        self.retiring.add(task)
        task.add_done_callback(self.retiring.discard)
        labels = (model.name, str(model.version))
        self.metrics.queue.pop(labels, None)
        self.metrics.admitted.pop(labels, None)
        self.metrics.generation.retire(*labels)
        self.metrics.model_info.remove(*labels, model.manifest.task, model.provider)
        self.metrics.load_seconds.remove(*labels)
        for watcher in self.watchers:
            watcher()
        return task

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                await self.refresh()
            except OSError as error:
                log.error("the repository %s cannot be read: %s", self.folder, error)


def _listing(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Versions by name, newest first, each with its manifest's time of change."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name in bundle.names(folder):
        versions = []
        for version in reversed(bundle.versions(folder, name)):
            with suppress(FileNotFoundError):  # removed just now
                versions.append((version, (folder / name / str(version) / bundle.MANIFEST).stat().st_mtime))
        found[name] = versions
    return found
