"""What a request's "name", "name:version" or "name@alias" means in this moment.

A reference that always means one loaded model is one look into a dict. The bare name of a model whose traffic is split
goes by its shares: at random, or by a hash of the session's id, so that a session stays with its version for as long
as the shares stay (and with most of them when the shares move).
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from export import bundle
from server.runtime.model import Model

# Names that jobs give, with or without a version.
BY_A_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(:[0-9]{1,9})?")

Session = Callable[[], str | None]


class UnknownModel(LookupError):
    """No such model, version or alias, or it is not served; the message says what is."""


class NotLoaded(LookupError):
    """The model is there, and loaded when it is asked for: await `load(reference)` and get it again."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"{reference} is not loaded")
        self.reference = reference


@dataclass(frozen=True)
class View:
    """What the references to one name mean. newest: that the bare name means where `split` is empty, None where no
    version is served. split: shares of the traffic added up to the last, which is 1, and their versions. loadable:
    versions that are loaded when asked for. absent: why other published versions are not served."""

    newest: int | None = None
    aliases: Mapping[str, int] = field(default_factory=dict)
    split: tuple[tuple[float, int], ...] = ()
    lazy: bool = False
    loadable: frozenset[int] = frozenset()
    absent: Mapping[int, str] = field(default_factory=dict)


class References:
    """`views`, `ready`: by name what its references mean and the loaded versions; whoever changes them says so with
    `show`. `models`: the newest version of every name that has one loaded. `watchers` are called on every change."""

    def __init__(self) -> None:
        self.views: dict[str, View] = {}
        self.ready: dict[str, dict[int, Model]] = {}
        self.models: dict[str, Model] = {}
        self.direct: dict[str, Model] = {}
        self.shown: dict[str, list[str]] = {}
        self.watchers: list[Callable[[], None]] = []

    def get(self, reference: str, session: Session | None = None) -> Model:
        """The model that a reference means. session: tells the id by which a split name stays with a version.

        Raises UnknownModel; NotLoaded for one that must be loaded first.
        """
        model = self.direct.get(reference)
        if model is not None:
            return model
        name, version = self.resolve(reference, session)
        model = self.ready[name].get(version)
        if model is None:
            raise NotLoaded(f"{name}:{version}")
        model.used = time.perf_counter()
        return model

    def resolve(self, reference: str, session: Session | None = None) -> tuple[str, int]:
        """Name and version, loaded or to be loaded. Raises UnknownModel."""
        name, number, alias = parts(reference)
        view = self.views.get(name)
        if view is None:
            served = ", ".join(sorted(one for one, view in self.views.items() if view.newest)) or "none yet"
            raise UnknownModel(f"no model {name!r} is served; served are: {served}")
        ready = self.ready[name]
        if alias is not None:
            if alias not in view.aliases:
                known = ", ".join(sorted(view.aliases)) or "none"
                raise UnknownModel(f"{name} has no alias {alias!r} that is served; its aliases: {known}")
            return name, view.aliases[alias]
        if number is not None:
            version = int(number) if number.isascii() and number.isdecimal() else 0
            if version in ready or version in view.loadable:
                return name, version
            why = f" ({view.absent[version]})" if version in view.absent else ""
            there = [str(one) for one in sorted({*ready, *view.loadable})]
            served = f"version {there[0]} is" if len(there) == 1 else f"versions {', '.join(there) or 'none'} are"
            raise UnknownModel(f"version {number!r} of {name} is not loaded{why}; {served} served")
        if view.split:
            return name, chosen(view.split, session() if session is not None else None)
        if view.newest is None:
            reasons = "; ".join(f"version {one}: {why}" for one, why in sorted(view.absent.items()))
            raise UnknownModel(f"no version of {name} is served; {reasons or 'there is none'}")
        return name, view.newest

    def unseen(self, reference: str, folder: Path) -> bool:
        """Whether what it names lies in the repository's folder and nothing is known of it yet, as a job has published
        it just now: it is about to be served."""
        if not BY_A_JOB.fullmatch(reference):
            return False
        name, number, _ = parts(reference)
        view = self.views.get(name)
        if number is None:
            return view is None and bool(bundle.versions(folder, name))
        version = int(number)
        if view is not None and (version in self.ready[name] or version in view.loadable or version in view.absent):
            return False
        return (folder / name / str(version) / bundle.MANIFEST).is_file()

    def show(self, name: str, view: View | None, ready: dict[int, Model]) -> None:
        """From now on the references to `name` mean this; None: it is there no more."""
        for reference in self.shown.pop(name, ()):
            del self.direct[reference]
        self.models.pop(name, None)
        if view is None:
            self.views.pop(name, None)
            self.ready.pop(name, None)
        else:
            self.views[name], self.ready[name] = view, ready
            if (newest := ready.get(view.newest or 0)) is not None:
                self.models[name] = newest
            # The use of lazy models is noted, and shares are drawn: both go the longer way.
            shown = {} if view.lazy else _direct(name, view, ready)
            self.direct.update(shown)
            self.shown[name] = list(shown)
        for watcher in self.watchers:
            watcher()


def _direct(name: str, view: View, ready: Mapping[int, Model]) -> dict[str, Model]:
    found = {f"{name}:{version}": model for version, model in ready.items()}
    found |= {f"{name}@{alias}": ready[version] for alias, version in view.aliases.items() if version in ready}
    if view.newest is not None and view.newest in ready and not view.split:
        found[name] = ready[view.newest]
    return found


def parts(reference: str) -> tuple[str, str | None, str | None]:
    """Name, version and alias of "name", "name:version" or "name@alias"."""
    name, at, alias = reference.partition("@")
    if at:
        return name, None, alias
    name, colon, version = reference.partition(":")
    return name, version if colon else None, None


def chosen(split: tuple[tuple[float, int], ...], session: str | None) -> int:
    """A version by the shares."""
    if session is None:
        place = random.random()
    else:
        digest = hashlib.blake2b(session.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        place = int.from_bytes(digest) / 2**64
    return next((version for upto, version in split if place < upto), split[-1][1])
