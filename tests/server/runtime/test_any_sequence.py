"""Whatever is done to a repository in whatever order: every answer is that of the version which is named, and only what
is truly not there is refused."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.metrics import Metrics
from server.runtime.deployment import All, Deployment, Latest, Named
from server.runtime.footprint import footprint
from server.runtime.repository import CannotLoad, NotLoaded, Repository, UnknownModel, UnknownVersion
from server.settings import Settings
from tests.server.bundles import publish_constant

NAMES = ("calm", "lazy")
BALLAST = 50_000
ROOM = 5  # models that the memory is enough for

EVERY = ["", *(f":{version}" for version in range(1, 5)), "@production", "@canary"]

names = st.sampled_from(NAMES)
versions = st.integers(1, 4)
aliases = st.sampled_from(["production", "canary"])


class Expected:
    """What is to be served of a name, worked out plainly."""

    def __init__(self, lazy: bool) -> None:
        self.published = 0
        self.deployment = Deployment(lazy=lazy)
        self.off = False
        self.unloaded: set[int] = set()
        self.asked: set[int] = set()

    def available(self) -> list[int]:
        return [] if self.off else [v for v in range(self.published, 0, -1) if v not in self.unloaded]

    def policy(self) -> list[int]:
        match self.deployment.versions:
            case Latest(n=n):
                return self.available()[:n]
            case Named(versions=named):
                return [version for version in self.available() if version in named]
        return self.available()

    def served(self) -> set[int]:
        return {*self.policy(), *(set(self.available()) & (self.deployment.referred() | self.asked))}

    def meant(self, reference: str) -> set[int]:
        """Versions that may answer; none where nothing may."""
        _, at, alias = reference.partition("@")
        _, colon, version = reference.partition(":")
        if at:
            return {self.deployment.aliases.get(alias, 0)} & self.served()
        if colon:
            return {int(version)} & self.served()
        split = {int(version) for version in self.deployment.traffic} & self.served()
        newest = max(self.policy(), default=max(self.served(), default=0))
        return split or {newest} - {0}


class Sequences(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.home = tempfile.TemporaryDirectory()
        self.folder = Path(self.home.name) / "repository"
        self.loop = asyncio.new_event_loop()
        self.expected = {name: Expected(lazy=name == "lazy") for name in NAMES}
        for name in NAMES:
            for _ in range(3):
                self.publish(name, refresh=False)
        one = footprint(self.manifest)
        self.repository = Repository(
            Settings(home=Path(self.home.name), poll_seconds=1000.0, model_memory_bytes=ROOM * one + 100), Metrics()
        )
        self.loop.run_until_complete(self.repository.start())
        self.change("lazy", lazy=True)

    def publish(self, name: str, refresh: bool) -> None:
        expected = self.expected[name]
        expected.published += 1
        number = NAMES.index(name) * 100 + expected.published
        self.manifest = publish_constant(self.folder, name, float(number), ballast=BALLAST)
        if refresh:
            self.loop.run_until_complete(self.repository.refresh())

    def change(self, name: str, **fields: object) -> None:
        expected = self.expected[name]
        new = msgspec.structs.replace(expected.deployment, **fields)
        there = set(range(1, expected.published + 1))
        named = set(new.versions.versions) if isinstance(new.versions, Named) else set()
        try:
            self.loop.run_until_complete(
                self.repository.deploy(name, lambda old: msgspec.structs.replace(old, **fields))
            )
        except UnknownVersion:
            assert not (new.referred() | named) <= there
            return
        assert new.referred() | named <= there
        expected.unloaded -= new.referred() - expected.deployment.referred()
        expected.deployment = new
        self.ask([(name, one) for one in EVERY])

    @rule(name=names)
    def publish_one(self, name: str) -> None:
        if self.expected[name].published < 4:
            self.publish(name, refresh=True)
            self.ask([(name, ""), (name, "@production")])

    @rule(name=names, alias=aliases, version=versions)
    def move_an_alias(self, name: str, alias: str, version: int) -> None:
        self.change(name, aliases={**self.expected[name].deployment.aliases, alias: version})

    @rule(name=names, alias=aliases)
    def remove_an_alias(self, name: str, alias: str) -> None:
        there = self.expected[name].deployment.aliases
        self.change(name, aliases={one: version for one, version in there.items() if one != alias})

    @rule(name=names, shares=st.dictionaries(versions.map(str), st.floats(0.1, 1.0), max_size=2))
    def split_the_traffic(self, name: str, shares: dict[str, float]) -> None:
        self.change(name, traffic=shares)

    @rule(
        name=names,
        policy=st.builds(Latest, st.integers(1, 2)) | st.just(All()) | st.builds(Named, st.lists(versions, min_size=1)),
    )
    def choose_versions(self, name: str, policy: Latest | All | Named) -> None:
        self.change(name, versions=policy)

    @rule(name=names, size=st.integers(1, 4))
    def batch_otherwise(self, name: str, size: int) -> None:
        self.change(name, max_batch_size=size)

    @rule(name=names, version=versions | st.none())
    def unload(self, name: str, version: int | None) -> None:
        expected = self.expected[name]
        if version is not None and version > expected.published:
            return
        self.loop.run_until_complete(self.repository.unload(name, version))
        if version is None:
            expected.off = True
            expected.asked.clear()
        else:
            expected.unloaded.add(version)
            expected.asked.discard(version)

    @rule(name=names, version=versions)
    def load(self, name: str, version: int) -> None:
        expected = self.expected[name]
        there = version in expected.served()
        try:
            model = self.loop.run_until_complete(self.repository.load(f"{name}:{version}"))
        except UnknownModel:
            assert version > expected.published
            return
        except CannotLoad:
            assert not self.fits(name)
            return
        assert model.version == version
        if there:
            return
        if expected.off:
            expected.off, expected.unloaded = False, set(range(1, expected.published + 1))
        expected.unloaded.discard(version)
        expected.asked.add(version)

    def fits(self, name: str) -> bool:
        """Whether a lazy version has room beside those that are not lazy."""
        lasting = len(self.expected["calm"].served())
        return name != "lazy" or lasting + 1 <= ROOM

    @rule(
        asked=st.lists(
            st.tuples(names, st.just("") | versions.map(lambda v: f":{v}") | aliases.map(lambda a: f"@{a}")),
            min_size=1,
            max_size=8,
        )
    )
    def ask(self, asked: list[tuple[str, str]]) -> None:
        async def together() -> None:
            await asyncio.gather(*(self.ask_one(name, name + rest) for name, rest in asked))

        self.loop.run_until_complete(together())

    async def ask_one(self, name: str, reference: str) -> None:
        meant = self.expected[name].meant(reference)
        try:
            while True:
                try:
                    model = self.repository.get(reference)
                    break
                except NotLoaded:
                    await self.repository.load(reference)
        except UnknownModel:
            assert not meant, f"{reference} is refused, and means {meant}"
            return
        except CannotLoad:
            assert not self.fits(name)
            return
        assert model.name == name
        assert model.version in meant, f"{reference} is answered by {model.version}, and means {meant}"
        model.requests += 1
        deadline = time.perf_counter() + 60
        found = await model.submit(np.zeros((2, 2), np.float32), "predict", deadline=deadline).future
        model.requests -= 1
        assert found[0][0][0] == NAMES.index(name) * 100 + model.version

    @invariant()
    def every_reference_is_right(self) -> None:
        if hasattr(self, "repository"):
            self.ask([("calm", one) for one in EVERY])

    @invariant()
    def memory_is_kept(self) -> None:
        repository = getattr(self, "repository", None)
        if repository is not None and len(self.expected["calm"].served()) <= ROOM:
            sizes = [one.bytes for served in repository.served.values() for one in served.standings.values()]
            assert sum(sizes) <= repository.settings.model_memory_bytes

    def teardown(self) -> None:
        if hasattr(self, "repository"):
            self.loop.run_until_complete(self.repository.stop())
            assert self.repository.memory.taken == 0
        if hasattr(self, "loop"):
            self.loop.close()
            self.home.cleanup()


Sequences.TestCase.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnySequence = Sequences.TestCase
