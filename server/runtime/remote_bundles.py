"""What is published on object storage, mirrored into a folder of this machine: a version is brought here when it is to
be loaded.

A deployment lies in the store, beside the versions. It is replaced there by one write; of two servers that replace it
in the same moment the later one wins, since stores have no compare-and-set that all drivers offer.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from export.bundle import Manifest
from export.storage import Storage
from server.runtime.deployment import DEPLOYMENT, Deployment, decoded, encoded
from server.runtime.local_bundles import Published


class RemoteBundles:
    """As `Bundles` has it."""

    def __init__(self, url: str, folder: Path) -> None:
        """Raises StorageError where the store cannot be."""
        self.storage = Storage(url)
        self.folder = folder
        self.seen: dict[str, Published] = {}

    def look(self, again: Collection[str]) -> dict[str, Published]:
        found: dict[str, Published] = {}
        for name, listed in self.storage.listing().items():
            if listed.versions:
                published = Published(dict(listed.versions), listed.others.get(DEPLOYMENT))
                old = self.seen.get(name)
                found[name] = old if old is not None and old == published else published
        for name, published in self.seen.items():
            there = found[name].versions if name in found else {}
            for version in published.versions.keys() - there.keys():  # removed from the store
                shutil.rmtree(self.folder / name / str(version), ignore_errors=True)
        self.seen = found
        return found

    def fetch(self, name: str, version: int) -> Path:
        return self.storage.fetch(name, version, self.folder)

    def manifest(self, name: str, version: int) -> Manifest:
        return self.storage.manifest(name, version)

    def deployment(self, name: str) -> Deployment:
        path = f"{name}/{DEPLOYMENT}"
        try:
            content = self.storage.read(path)
        except FileNotFoundError:
            return Deployment()
        return decoded(content, f"{self.storage.url}/{path}")

    def deploy(self, name: str, deployment: Deployment, instead_of: Deployment) -> bool:
        if self.deployment(name) != instead_of:
            return False
        self.storage.write(f"{name}/{DEPLOYMENT}", encoded(deployment))
        return True
