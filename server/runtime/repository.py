"""Which models are served: versions of every name in the repository, as the deployment beside them says.

The repository is looked through every second or so. A new version is verified, loaded and warmed up in a thread while
the old one answers; then one assignment makes it the one that new requests get, and the old one answers what it holds.
A version that does not load is refused, and what was served before goes on.

Lazy models are loaded when they are first asked for. `model_memory_bytes` bounds what models take by their footprints:
lazy ones that were not used for the longest time are evicted to make room for what is to be loaded; the others count,
and are loaded whether or not there is room. Whoever holds an evicted model still gets its answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import msgspec

from export import bundle
from export.storage import mirror
from server import heap
from server.metrics import Metrics
from server.process import cores
from server.runtime.deployment import Deployment, DeploymentError, Named
from server.runtime.footprint import footprint
from server.runtime.local_bundles import Bundles, LocalBundles
from server.runtime.memory import Memory
from server.runtime.model import Model, load
from server.runtime.references import NotLoaded, References, UnknownModel, View, parts
from server.runtime.remote_bundles import RemoteBundles
from server.runtime.served import NOTHING, Plan, Refusal, Served, Standing
from server.runtime.shadowing import Shadowing
from server.settings import Settings

__all__ = ["CannotLoad", "Entry", "NotLoaded", "Repository", "UnknownModel", "UnknownVersion"]

log = logging.getLogger("espalier.repository")

# When it is worth asking again for a model that had no room, or whose files could not be fetched.
RETRY_SECONDS = 10
# A model that was just loaded is not evicted before whoever asked for it had this long to use it.
YOUNG_SECONDS = 1.0
# From when a model is closed until its memory is given back.
TRIM_SECONDS = 1.0


class CannotLoad(Exception):
    """The version is there and did not load, or has no room; the message says why. retry_after: seconds until it may
    have, None where asking again does not help."""

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnknownVersion(UnknownModel):
    """A deployment names a version that is not published. field: that names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Entry:
    """One version in the repository. state: "ready", "loading", "unloading" (answers what it holds), or "unavailable"
    for the `reason`."""

    name: str
    version: int
    state: Literal["ready", "loading", "unloading", "unavailable"]
    reason: str = ""


class Repository(References):
    """`served`: what is known of every name."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Raises StorageError for object storage that cannot be used here."""
        super().__init__()
        self.bundles = bundles_of(settings)
        self.folder = settings.repository
        self.settings = settings
        self.metrics = metrics
        self.served: dict[str, Served] = {}
        self.task: asyncio.Task[None] | None = None
        # Versions that are no longer served, while their last requests are answered.
        self.retiring: set[asyncio.Task[None]] = set()
        self.leaving: Counter[tuple[str, int]] = Counter()
        self.looking = asyncio.Lock()  # what is seen later is followed later
        self.memory = Memory(settings.model_memory_bytes)
        self.loads = asyncio.Semaphore(max(1, min(4, cores() - 1)))

    async def start(self) -> None:
        """Load what there is, then go on looking."""
        self.folder.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(mirror, self.folder, self.settings.repository_url)
        await self.refresh()
        self.task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stop looking, and wait until what was asked is answered."""
        under_way = [
            task for served in self.served.values() for task in (served.task, *served.demanded.values()) if task
        ]
        for task in [self.task, *under_way]:
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        for served in self.served.values():
            await asyncio.gather(*served.loading.values(), return_exceptions=True)
            for standing in served.standings.values():
                self._retire(standing)
        await asyncio.gather(*self.retiring)

    async def load(self, reference: str) -> Model:
        """Load what a reference means: one that is loaded when asked for, or that was unloaded, refused or is not among
        the versions that the deployment serves. It stays for as long as it is not unloaded. Of several callers at
        once all wait for the one load. Raises UnknownModel, CannotLoad."""
        name, number, alias = parts(reference)
        looked = insisted = False
        while True:
            try:
                model = self.get(reference)
                if looked and (insisted or reference != name or not self.served[name].unloaded):
                    return model
            except NotLoaded as error:
                served = self.served[name]
                if served.task is not None:  # a name that is new
                    await asyncio.shield(served.task)
                else:
                    await self._demand_or_another(served, int(error.reference.rpartition(":")[2]), reference)
                looked = insisted = True
                continue
            except UnknownModel:
                if insisted:
                    raise
            if not looked:
                await self._look_now(name)
                looked = True
            elif await self._insist(name, number, alias):
                insisted = True
            else:
                raise UnknownModel(f"there is no {reference} in the repository")

    async def unload(self, name: str, version: int | None = None) -> None:
        """Serve a model or one version of it no more, until it is loaded again or the server starts anew; where the
        policy has another version for it, that takes its place first. Returns when what it held is answered. Raises
        UnknownModel."""
        served = self._named(name)
        if version is not None and version not in served.published.versions:
            raise UnknownModel(f"there is no version {version} of {name} in the repository")
        async with served.lock:
            leaving = [one for number, one in served.standings.items() if version in (None, number)]
            if version is None:
                served.off = True
                served.asked.clear()
            else:
                served.unloaded.add(version)
                served.asked.discard(version)
            self._commit(served, await self._plan(served, served.deployment))
        await asyncio.gather(*(standing.retired for standing in leaving if standing.retired is not None))

    async def deploy(self, name: str, change: Callable[[Deployment], Deployment]) -> Deployment:
        """Change how a model is served: what the new deployment names is loaded first, then the file is replaced, and
        at once every new request is answered by it. change: from the deployment in the file to the new one; it is
        called again where somebody else has replaced the file meanwhile, and what it raises is raised.

        Raises UnknownModel for a name or version that is not there, CannotLoad where a version does not load: all stays
        as it was. DeploymentError for a file that cannot be read, OSError.
        """
        await self._look()
        served = self._named(name)
        async with served.lock:
            while True:
                old = await asyncio.to_thread(self.bundles.deployment, name)
                deployment = change(old)
                _check(served, deployment, old)
                # What is named anew is wanted, though it was unloaded.
                wanted = served.unloaded & (deployment.referred() - old.referred())
                served.unloaded -= wanted
                plan = None
                try:
                    plan = await self._plan(served, deployment, strict=True)
                    if deployment.shadow and any(one.model.engine for one in plan.standings.values()):
                        raise DeploymentError(
                            "a language model is not shadowed, only what answers in batches", "shadow"
                        )
                    replaced = await asyncio.to_thread(self.bundles.deploy, name, deployment, old)
                except BaseException:
                    served.unloaded |= wanted
                    if plan is not None:
                        self._discard(served, plan.standings.values())
                    raise
                if replaced:
                    break
                served.unloaded |= wanted
                self._discard(served, plan.standings.values())
            served.trouble = ""
            self._commit(served, plan)
        return deployment

    async def deployment(self, name: str) -> Deployment:
        """How a model is to be served, as the file says. Raises UnknownModel, DeploymentError, OSError."""
        self._named(name)
        return await asyncio.to_thread(self.bundles.deployment, name)

    async def manifest(self, name: str, version: int) -> bundle.Manifest:
        """Of a published version, loaded or not. Raises DamagedBundle, OSError."""
        model = self.ready.get(name, {}).get(version)
        return model.manifest if model is not None else await asyncio.to_thread(self.bundles.manifest, name, version)

    def index(self) -> list[Entry]:
        """All versions in the repository, and those that still answer, by name and version."""
        found: list[Entry] = []
        for served in self.served.values():
            loading = {version for version, _ in served.loading}
            leaving = {version for name, version in self.leaving if name == served.name}
            for version in {*served.published.versions, *served.standings, *leaving}:
                if version in served.standings:
                    entry = Entry(served.name, version, "ready", served.trouble)
                elif version in loading:
                    entry = Entry(served.name, version, "loading")
                elif version in leaving:
                    entry = Entry(served.name, version, "unloading")
                elif version in served.view.loadable:
                    entry = Entry(served.name, version, "unavailable", "loaded when it is asked for")
                else:
                    entry = Entry(served.name, version, "unavailable", served.absence(version))
                found.append(entry)
        return sorted(found, key=lambda entry: (entry.name, entry.version))

    async def refresh(self) -> None:
        """Bring what is served in line with the repository. Raises OSError."""
        await self._look()
        await asyncio.gather(*(served.task for served in list(self.served.values()) if served.task is not None))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            await self._look_now()

    async def _look_now(self, name: str | None = None) -> None:
        """See what has changed, and wait until `name` is served so. Where the repository cannot be read, what is served
        goes on."""
        try:
            await self._look()
        except OSError as error:
            log.error("the repository %s cannot be read: %s", self.folder, error)
        if name in self.served and (task := self.served[name].task) is not None:
            await asyncio.shield(task)

    async def _look(self) -> None:
        """See what has changed in the repository; every name that has is looked over, in a task of its own."""
        async with self.looking:
            again = {name for name, served in self.served.items() if served.refused}
            there = await asyncio.to_thread(self.bundles.look, again)
            for name in there.keys() - self.served.keys():
                self.served[name] = Served(name)
                # Whoever asks for it already waits until it is loaded.
                versions = frozenset(there[name].versions)
                self.show(name, View(max(versions), loadable=versions), {})
            for name, served in list(self.served.items()):
                published = there.get(name, NOTHING)
                if published == served.published and not served.retry:
                    continue
                served.published, served.stale, served.retry = published, True, False
                if served.task is None:
                    served.task = asyncio.create_task(self._look_over(served))

    async def _look_over(self, served: Served) -> None:
        try:
            while served.stale:
                served.stale = False
                async with served.lock:
                    await self._follow(served)
                    self._commit(served, await self._plan(served, served.deployment))
        except Exception:  # of one name; the others are served
            log.exception("%s cannot be brought in line with the repository", served.name)
            served.retry = True
        finally:
            served.task = None
        if not served.published.versions and not served.standings and self.served.get(served.name) is served:
            del self.served[served.name]
            self.show(served.name, None, {})
            self.metrics.aliases.pop(served.name, None)
            log.info("%s is gone from the repository and served no more", served.name)

    async def _follow(self, served: Served) -> None:
        """Read the deployment where it is another. One that cannot be read is not followed: the one before is."""
        mark = served.published.deployment
        if mark == served.read:
            return
        try:
            served.deployment = await asyncio.to_thread(self.bundles.deployment, served.name)
            served.trouble = ""
        except (DeploymentError, OSError) as error:
            served.trouble = f"its deployment is not followed: {error}"
            log.error("%s is served as before: %s", served.name, error)
        served.read = mark

    def _named(self, name: str) -> Served:
        if (served := self.served.get(name)) is None:
            raise UnknownModel(f"no model {name!r} is in the repository")
        return served

    def _lazy(self, deployment: Deployment) -> bool:
        return self.settings.lazy if deployment.lazy is None else deployment.lazy

    async def _plan(self, served: Served, deployment: Deployment, *, strict: bool = False) -> Plan:
        """Load what a deployment wants of a name, newest first. Nothing is served by that yet.

        strict: whether a version that does not load is CannotLoad, after which nothing has changed; else it is left
        out, or goes on as it was made before.
        """
        run, lazy = deployment.run(), self._lazy(deployment)
        candidates, most = served.candidates(deployment)
        referred = served.referred(deployment)
        if lazy:
            return await self._lazy_plan(served, deployment, referred, candidates, most)
        standings: dict[int, Standing] = {}
        policy: list[int] = []
        try:
            before = served.deployment.referred()
            for version in referred:
                new = strict and (version in served.standings or version not in before)
                if standing := await self._stand(served, version, run, new):
                    standings[version] = standing
            for version in candidates:
                if len(policy) == most:
                    break
                again = strict and version in served.standings
                if standing := standings.get(version) or await self._stand(served, version, run, again):
                    standings[version] = standing
                    policy.append(version)
        except BaseException:
            self._discard(served, standings.values())
            raise
        return Plan(deployment, False, standings, policy, frozenset())

    async def _stand(self, served: Served, version: int, run: Deployment, strict: bool) -> Standing | None:
        try:
            standing = await self._bring(served, version, run, lazy=False)
        except CannotLoad:
            if strict:
                raise
            old = served.standings.get(version)
            if old is None:
                return None
            standing = old
        standing.lazy = False  # from now on, so that it is not evicted before it holds
        return standing

    async def _lazy_plan(
        self, served: Served, deployment: Deployment, referred: list[int], candidates: list[int], most: int
    ) -> Plan:
        """Nothing is loaded, but what takes the place of a version that is in use."""
        run = deployment.run()

        def chosen() -> list[int]:
            return [version for version in candidates if served.refusal(version, run) is None][:most]

        policy = chosen()
        brought: Standing | None = None
        while (
            brought is None and policy and policy[0] not in served.standings and served.view.newest in served.standings
        ):
            try:
                brought = await self._bring(served, policy[0], run, lazy=True)
            except CannotLoad:
                if policy == chosen():  # for want of room: it is loaded when asked for
                    break
                policy = chosen()
        loadable = {version for version in referred if served.refusal(version, run) is None} | set(policy)
        for alias, version in deployment.aliases.items():
            if version not in loadable and (old := served.view.aliases.get(alias)) in served.available():
                loadable |= {old}  # the alias stays with it
        standings = {
            version: one for version, one in served.standings.items() if version in loadable and one.run == run
        }
        if brought is not None:
            standings.setdefault(brought.model.version, brought)
        return Plan(deployment, True, standings, policy, frozenset(loadable))

    def _commit(self, served: Served, plan: Plan) -> None:
        """From now on, serve what was planned: with no turn of the loop between the old and the new."""
        for alias, version in plan.deployment.aliases.items():
            old = served.view.aliases.get(alias)
            usable = version in plan.standings or version in plan.loadable
            if not usable and old in served.standings and old in served.available():
                plan.standings.setdefault(old, served.standings[old])  # the alias stays with it
        if plan.lazy:  # what was loaded on demand while the plan was made
            for version, standing in served.standings.items():
                if version in plan.loadable and standing.run == plan.deployment.run():
                    plan.standings.setdefault(version, standing)
            # And without what was evicted meanwhile.
            plan.standings = {version: one for version, one in plan.standings.items() if one.retired is None}
        old_standings, served.standings = served.standings, plan.standings
        served.deployment = plan.deployment
        served.view = plan.view(served)
        for standing in plan.standings.values():
            standing.lazy = plan.lazy
        self._show(served)
        for standing in old_standings.values():
            if served.standings.get(standing.model.version) is not standing:
                self._retire(standing)

    def _show(self, served: Served) -> None:
        self._shadow(served)
        for version, standing in served.standings.items():
            if not standing.served:
                self._measure(standing)
            shadowing = None if served.shadow is None or served.shadow.version == version else served.shadowing
            standing.model.shadow = shadowing.of(standing.model) if shadowing else None
        self.show(served.name, served.view, {version: one.model for version, one in served.standings.items()})
        self.metrics.aliases[served.name] = served.view.aliases

    def _shadow(self, served: Served) -> None:
        """Have what asks the shadow that the deployment names."""
        shadow = served.deployment.shadow
        if shadow == served.shadow:
            return
        served.shadow, served.shadowing = shadow, None
        if shadow is None:
            return
        name, version = served.name, shadow.version

        async def find() -> Model:
            try:
                return self.get(f"{name}:{version}")
            except NotLoaded:
                await self._demand(served, version)
                return self.get(f"{name}:{version}")

        def count(outcome: str) -> None:
            self.metrics.shadows[name, str(version), outcome] += 1

        seconds = served.deployment.request_seconds or self.settings.request_seconds
        served.shadowing = Shadowing(shadow.share, seconds, find, count)

    def _discard(self, served: Served, standings: Iterable[Standing]) -> None:
        """Close what was loaded and is not to be served after all."""
        for standing in standings:
            if served.standings.get(standing.model.version) is not standing:
                self._retire(standing)
        for standing in served.standings.values():
            standing.lazy = self._lazy(served.deployment)

    async def _insist(self, name: str, number: str | None, alias: str | None) -> bool:
        """Load by request what is not served, or was unloaded: a version, that of an alias, or the whole name. False
        where there is no such thing. Raises CannotLoad."""
        served = self.served.get(name)
        if served is None:
            return False
        version = None
        if alias is not None:
            version = served.deployment.aliases.get(alias, 0)
        elif number is not None:
            version = int(number) if number.isascii() and number.isdecimal() else 0
        if version is not None and version not in served.published.versions:
            return False
        async with served.lock:
            if served.off:
                served.off = False
                served.unloaded = set() if version is None else set(served.published.versions)
            if version is None:
                served.unloaded.clear()
                served.refused.clear()
            else:
                served.unloaded.discard(version)
                served.refused.pop(version, None)
                served.asked.add(version)
            self._commit(served, await self._plan(served, served.deployment))
        wanted = served.available() if version is None else [version]
        refused = [one for one in wanted if one in served.refused]
        if refused and (version is not None or served.view.newest is None):
            raise CannotLoad(f"{name}:{refused[0]} does not load: {served.refused[refused[0]].reason}")
        return True

    async def _demand_or_another(self, served: Served, version: int, reference: str) -> None:
        """Load a version; where it does not load, all is well if the reference means another one from then on."""
        try:
            await self._demand(served, version)
        except CannotLoad as error:
            try:
                if self.resolve(reference) == (served.name, version):
                    raise
            except UnknownModel:
                raise error from None

    async def _demand(self, served: Served, version: int) -> None:
        """Load a lazy version that a request waits for. Raises CannotLoad."""
        if (task := served.demanded.get(version)) is None:
            task = served.demanded[version] = asyncio.create_task(self._meet(served, version))
            task.add_done_callback(lambda _: served.demanded.pop(version, None))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waits for it is told
        await asyncio.shield(task)

    async def _meet(self, served: Served, version: int) -> None:
        try:
            standing = await self._bring(served, version, served.deployment.run(), lazy=True)
        except CannotLoad:
            if version in served.refused:  # another takes its place
                async with served.lock:
                    self._commit(served, await self._plan(served, served.deployment))
            raise
        if served.standings.get(version) is standing:
            return
        wanted = version in served.view.loadable and version not in served.standings
        if wanted and standing.run == served.deployment.run() and standing.retired is None:
            served.standings[version] = standing
            standing.lazy = True
            self._show(served)
        else:
            self._discard(served, [standing])

    async def _bring(self, served: Served, version: int, run: Deployment, *, lazy: bool) -> Standing:
        """The version, as `run` makes it: loaded already, or now. Raises CannotLoad."""
        old = served.standings.get(version)
        if old is not None and old.run == run:
            return old
        if refusal := served.refusal(version, run):
            raise CannotLoad(f"{served.name}:{version} does not load: {refusal.reason}")
        key = (version, msgspec.json.encode(run))
        if (task := served.loading.get(key)) is None:
            task = served.loading[key] = asyncio.create_task(self._load(served, version, run, lazy))
            task.add_done_callback(lambda _: served.loading.pop(key, None))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def _load(self, served: Served, version: int, run: Deployment, lazy: bool) -> Standing:
        name, mark = served.name, served.published.versions.get(version, ())
        room = 0
        ready = False
        try:
            folder = await asyncio.to_thread(self.bundles.fetch, name, version)
            room = footprint(await asyncio.to_thread(bundle.read_manifest, folder))
            if not await self.memory.reserve(room, self._standings, self._evict, insist=not lazy):
                words = f"{name}:{version} takes {room:,} bytes of the {self.memory.budget:,} that models may take"
                raise CannotLoad(f"{words}; the rest is taken by models that are not evicted", RETRY_SECONDS)
            try:
                async with self.loads:
                    loaded = await asyncio.to_thread(load, folder, self.settings, run)
                model = Model(loaded, self.metrics, self.settings)
                ready = True
            finally:
                self.memory.loaded(room, ready)
        except CannotLoad:
            self.metrics.loads[name, "failed"] += 1
            raise
        except OSError as error:  # the files could not be read now
            served.retry = True
            self.metrics.loads[name, "failed"] += 1
            log.error("%s version %d cannot be read: %s", name, version, error)
            raise CannotLoad(f"{name}:{version} cannot be read: {error}", RETRY_SECONDS) from error
        except Exception as error:  # a graph that ONNX Runtime cannot load raises any of its own classes
            served.refused[version] = Refusal(mark, run, str(error))
            self.metrics.loads[name, "failed"] += 1
            self.metrics.refused.labels(name).inc()
            log.error("%s version %d is refused: %s", name, version, error)
            raise CannotLoad(f"{name}:{version} does not load: {error}") from error
        served.refused.pop(version, None)
        self.metrics.loads[name, "loaded"] += 1
        return Standing(model, run, room, loaded.seconds, time.perf_counter(), lazy)

    def _measure(self, standing: Standing) -> None:
        model, standing.served = standing.model, True
        labels = (model.name, str(model.version))
        self.metrics.model_info.labels(*labels, model.manifest.task, model.provider).set(1)
        self.metrics.load_seconds.labels(*labels).set(standing.seconds)
        self.metrics.queue[labels], self.metrics.admitted[labels] = model.waiting, model.admitted
        if model.cache is not None:
            self.metrics.cached_bytes[labels] = model.cached_bytes
        self.metrics.memory[labels] = standing.bytes
        log.info("serving %s version %s on %s, loaded in %.2f s", *labels, model.provider, standing.seconds)

    def _standings(self) -> list[Standing]:
        return [standing for served in self.served.values() for standing in served.standings.values()]

    def _evict(self) -> bool:
        """Take the lazy version that was not used for the longest time out of service, an idle one before all others.
        Whether there was one."""
        now = time.perf_counter()
        lazy = [
            (standing.model.requests > 0, standing.model.used, served, version)
            for served in self.served.values()
            for version, standing in served.standings.items()
            if standing.lazy and (standing.model.used > standing.born or now - standing.born > YOUNG_SECONDS)
        ]
        if not lazy:
            return False
        _, _, served, version = min(lazy, key=lambda one: one[:2])
        standing = served.standings.pop(version)
        self._show(served)
        self._retire(standing)
        self.metrics.evictions[served.name] += 1
        log.info("%s version %d is evicted", served.name, version)
        return True

    def _retire(self, standing: Standing) -> None:
        if standing.retired is not None:
            return
        model = standing.model
        labels = (model.name, str(model.version))
        self.leaving[model.name, model.version] += 1
        self.memory.leaving += standing.bytes
        standing.retired = asyncio.create_task(self._close(standing))
        self.retiring.add(standing.retired)
        standing.retired.add_done_callback(self._gone)
        served = self.served.get(model.name)
        new = None if served is None else served.standings.get(model.version)
        if standing.served and (new is None or new.model.provider != model.provider):
            self.metrics.model_info.remove(*labels, model.manifest.task, model.provider)
        if new is not None or not standing.served:
            return  # the other labels are those of another
        self.metrics.queue.pop(labels, None)
        self.metrics.admitted.pop(labels, None)
        self.metrics.cached_bytes.pop(labels, None)
        self.metrics.memory.pop(labels, None)
        self.metrics.generation.retire(*labels)
        self.metrics.load_seconds.remove(*labels)

    async def _close(self, standing: Standing) -> None:
        model = standing.model
        try:
            await model.close()
        finally:
            self.memory.free(standing.bytes)
            self.leaving[model.name, model.version] -= 1
            if self.leaving[model.name, model.version] == 0:
                del self.leaving[model.name, model.version]

    def _gone(self, retired: asyncio.Task[None]) -> None:
        self.retiring.discard(retired)
        # By then whoever held the model in this turn of the loop has let go of it.
        loop = asyncio.get_running_loop()
        loop.call_later(TRIM_SECONDS, loop.run_in_executor, None, heap.trim)


def bundles_of(settings: Settings) -> Bundles:
    """Where the bundles come from. Raises StorageError."""
    if settings.repository_url:
        return RemoteBundles(settings.repository_url, settings.repository)
    return LocalBundles(settings.repository)


def _check(served: Served, deployment: Deployment, old: Deployment) -> None:
    """Raises UnknownVersion for one that is newly named and not published."""
    before = _named_by(old)
    for field, versions in _named_by(deployment).items():
        for version in sorted(versions - before[field] - served.published.versions.keys()):
            there = ", ".join(str(one) for one in sorted(served.published.versions))
            raise UnknownVersion(field, f"{field}: there is no version {version} of {served.name}; there are: {there}")


def _named_by(deployment: Deployment) -> dict[str, set[int]]:
    """Versions by the field that names them."""
    return {
        "aliases": set(deployment.aliases.values()),
        "traffic": {int(version) for version in deployment.traffic},
        "shadow": set() if deployment.shadow is None else {deployment.shadow.version},
        "versions": set(deployment.versions.versions) if isinstance(deployment.versions, Named) else set(),
    }
