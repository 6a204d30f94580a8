"""What is published in a folder of this machine, looked through cheaply: a thousand models cost a thousand stats.

What a model's folder holds is read again only when the folder has changed: versions come and go by rename, which
changes its time. Three things do not, and are looked at every time: versions that were refused (their manifest may be
mended), versions without a manifest (somebody is copying), and deployment.json (edited in place).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from export.bundle import MANIFEST, Manifest, read_manifest
from server.runtime.deployment import DEPLOYMENT, Deployment, read, write

# A folder changed less than this before it was read may change again at the same time of its clock.
RACY_NS = 2_000_000_000

# Of a file's content: another when that is another.
Mark = tuple[float | int | str, ...]


class Published(NamedTuple):
    """versions: by number, the mark of the manifest. deployment: that of deployment.json, None where there is none."""

    versions: Mapping[int, Mark]
    deployment: Mark | None


class Bundles(Protocol):
    """Where a repository's bundles come from. All of it may block: it is called on threads."""

    folder: Path

    def look(self, again: Collection[str]) -> dict[str, Published]:
        """What is there by name, names without a version left out. again: names that are read in any case. Raises
        OSError."""

    def fetch(self, name: str, version: int) -> Path:
        """The bundle's folder on this machine. Raises OSError."""

    def manifest(self, name: str, version: int) -> Manifest:
        """Raises DamagedBundle, OSError."""

    def deployment(self, name: str) -> Deployment:
        """Raises DeploymentError, OSError."""

    def deploy(self, name: str, deployment: Deployment, instead_of: Deployment) -> bool:
        """Replace a model's deployment; False where it was another than `instead_of`. Raises DeploymentError,
        OSError."""


@dataclass(frozen=True)
class _Seen:
    changed: int
    settled: bool
    published: Published


class LocalBundles:
    """A folder `<name>/<version>/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[str, _Seen] = {}

    def look(self, again: Collection[str]) -> dict[str, Published]:
        seen: dict[str, _Seen] = {}
        now = time.time_ns()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                with suppress(FileNotFoundError, NotADirectoryError):  # gone just now; a file
                    changed = entry.stat().st_mtime_ns
                    old = self.seen.get(entry.name)
                    if old is None or old.changed != changed or not old.settled or entry.name in again:
                        old = _read(Path(entry.path), changed, now, old)
                    elif old.published.deployment is not None:
                        mark = _mark(Path(entry.path) / DEPLOYMENT)
                        if mark != old.published.deployment:
                            old = _Seen(changed, True, Published(old.published.versions, mark))
                    seen[entry.name] = old
        self.seen = seen
        return {name: one.published for name, one in seen.items() if one.published.versions}

    def fetch(self, name: str, version: int) -> Path:
        return self.folder / name / str(version)

    def manifest(self, name: str, version: int) -> Manifest:
        return read_manifest(self.folder / name / str(version))

    def deployment(self, name: str) -> Deployment:
        return read(self.folder / name)

    def deploy(self, name: str, deployment: Deployment, instead_of: Deployment) -> bool:
        folder = self.folder / name
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # other servers on this machine may serve the folder, too
            if read(folder) != instead_of:
                return False
            write(folder, deployment)
            return True
        finally:
            os.close(descriptor)


def _read(folder: Path, changed: int, now: int, old: _Seen | None) -> _Seen:
    """What a model's folder holds. The object of before is kept where that is the same."""
    versions: dict[int, Mark] = {}
    whole = True
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.isdecimal() or not entry.name.isascii():
                continue
            mark = _mark(Path(entry.path) / MANIFEST)
            if mark is None:
                whole = False
            else:
                versions[int(entry.name)] = mark
    published = Published(versions, _mark(folder / DEPLOYMENT))
    if old is not None and old.published == published:
        published = old.published
    return _Seen(changed, whole and changed < now - RACY_NS, published)


def _mark(path: Path) -> Mark | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
