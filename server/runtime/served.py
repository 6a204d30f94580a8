"""One name in the repository: what is published of it, what is loaded, and which versions its deployment wants."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from server.runtime.deployment import All, Deployment, Latest, Shadow
from server.runtime.local_bundles import Mark, Published
from server.runtime.model import Model
from server.runtime.references import View
from server.runtime.shadowing import Shadowing

UNLOADED = "unloaded by request"
UNWANTED = "not among the versions that the deployment serves"
NOTHING, DEFAULT, BEFORE = Published({}, None), Deployment(), View()


@dataclass(eq=False)
class Standing:
    """A loaded version. run: what it was made by. bytes: its footprint. seconds: that loading took. born: when it was
    ready, on the clock of time.perf_counter(). served: whether it has been served."""

    model: Model
    run: Deployment
    bytes: int
    seconds: float
    born: float
    lazy: bool
    served: bool = False
    retired: asyncio.Task[None] | None = None


class Refusal(NamedTuple):
    """A version that did not load, which is not tried again before its manifest or what it is made by is another."""

    mark: Mark
    run: Deployment
    reason: str


@dataclass(eq=False)
class Served:
    """deployment: that is followed; `trouble` says why it is not the one in the file. off, unloaded: by request, the
    whole name or versions of it, for as long as this server lives. asked: versions loaded by request, whatever the
    deployment says. lock: held by whoever changes what is served. stale: it is to be looked over once more; retry: at
    the next look through the repository."""

    name: str
    published: Published = NOTHING
    deployment: Deployment = DEFAULT
    read: Mark | None = None
    trouble: str = ""
    standings: dict[int, Standing] = field(default_factory=dict)
    loading: dict[tuple[int, bytes], asyncio.Task[Standing]] = field(default_factory=dict)
    demanded: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    refused: dict[int, Refusal] = field(default_factory=dict)
    off: bool = False
    unloaded: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    stale: bool = False
    retry: bool = False
    task: asyncio.Task[None] | None = None
    view: View = BEFORE
    shadow: Shadow | None = None
    shadowing: Shadowing | None = None

    def available(self) -> list[int]:
        """Versions that may be served, newest first."""
        return [] if self.off else sorted(self.published.versions.keys() - self.unloaded, reverse=True)

    def referred(self, deployment: Deployment) -> list[int]:
        """Those that are served whatever the policy is, newest first."""
        wanted = deployment.referred() | self.asked
        return [version for version in self.available() if version in wanted]

    def candidates(self, deployment: Deployment) -> tuple[list[int], int]:
        """Those that the policy may serve, newest first, and how many of them it does."""
        available = self.available()
        match deployment.versions:
            case Latest(n=most):
                return available, most
            case All():
                return available, len(available)
        named = set(deployment.versions.versions)
        return [version for version in available if version in named], len(named)

    def refusal(self, version: int, run: Deployment) -> Refusal | None:
        """Why it is not to be tried again."""
        found = self.refused.get(version)
        if found is None or found.mark != self.published.versions.get(version) or found.run != run:
            return None
        return found

    def absence(self, version: int) -> str:
        """Why a published version is not served."""
        if self.off or version in self.unloaded:
            return UNLOADED
        if version in self.refused:
            return self.refused[version].reason
        return UNWANTED


@dataclass
class Plan:
    """What is to be served of a name. policy: the versions that its policy chooses, newest first; the bare name means
    the first of them. loadable: of a lazy name."""

    deployment: Deployment
    lazy: bool
    standings: dict[int, Standing]
    policy: list[int]
    loadable: frozenset[int]

    def view(self, served: Served) -> View:
        """An alias whose new version does not load stays with its old one, if that is still there."""
        usable = {*self.standings, *self.loadable}
        newest = next((version for version in self.policy if version in usable), max(usable, default=None))
        aliases = {}
        for alias, version in self.deployment.aliases.items():
            if version in usable:
                aliases[alias] = version
            elif (old := served.view.aliases.get(alias)) in usable:
                aliases[alias] = old
        absent = {version: served.absence(version) for version in served.published.versions if version not in usable}
        return View(newest, aliases, shares(self.deployment.traffic, usable), self.lazy, self.loadable, absent)


def shares(traffic: dict[str, float], usable: Iterable[int]) -> tuple[tuple[float, int], ...]:
    """The shares of the usable versions, added up; none where only one would have any."""
    there = set(usable)
    weights = {int(version): weight for version, weight in traffic.items() if weight and int(version) in there}
    total, upto, found = sum(weights.values()), 0.0, []
    for version, weight in sorted(weights.items()):
        upto += weight / total
        found.append((upto, version))
    return tuple(found)
