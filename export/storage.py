"""Bundles on object storage (s3://, gs://, az://, and whatever else fsspec opens), mirrored into a repository folder.

They lie there as `<url>/<name>/<version>/`, and manifest.json is written last: a bundle is seen when it is whole. A
publisher takes a version by creating `<name>/<version>/.claim`, which stores with conditional writes (S3, Google Cloud
Storage, Azure, a local file system) let one publisher do. Where a driver has no such write, the later of two writers
keeps the claim; each looks at it again before its manifest, and the other one starts over with the next version. A
publisher that dies leaves a claimed version which nobody sees.

A folder that mirrors a store says so in a file of its own, MIRROR: whoever publishes into the folder publishes there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import msgspec

from export.bundle import MANIFEST, DamagedBundle, Manifest, decoded_manifest, verify
from export.staging import staging

MIRROR = ".mirror"
CLAIM = ".claim"
# What drivers call the time, the version or the hash of what they list.
MARKS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "created")

T = TypeVar("T")


class StorageError(OSError):
    """The store cannot be used now, or not at all; the message names it."""


class Listed(NamedTuple):
    """versions: by number, the mark of the manifest. others: the marks of files beside the versions, by name."""

    versions: dict[int, tuple[str, ...]]
    others: dict[str, tuple[str, ...]]


class Storage:
    """`url`: the folder in the store that holds the names. Every method raises StorageError."""

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise StorageError(f"{url}: object storage needs fsspec: pip install 'espalier[storage]'") from error
        self.url = url
        try:
            self.files, root = url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # no such protocol, no driver for it, with words; for want of credentials anything
            raise StorageError(f"{url}: {error}") from error
        self.root: str = root.rstrip("/")

    def listing(self) -> dict[str, Listed]:
        """By name; what is claimed and not yet whole is left out."""
        self.files.invalidate_cache()
        try:
            found: dict[str, dict[str, Any]] = self._asked(self.files.find, self.root, detail=True)
        except FileNotFoundError:
            return {}
        there: dict[str, Listed] = {}
        for path, info in found.items():
            parts = self._parts(path)
            name = parts[0]
            if name.startswith("."):
                continue
            mark = tuple(str(info.get(field, "")) for field in ("size", *MARKS))
            if len(parts) == 3 and is_version(parts[1]) and parts[2] == MANIFEST:
                there.setdefault(name, Listed({}, {})).versions[int(parts[1])] = mark
            elif len(parts) == 2:
                there.setdefault(name, Listed({}, {})).others[parts[1]] = mark
        return there

    def manifest(self, name: str, version: int) -> Manifest:
        """Raises DamagedBundle, too."""
        return decoded_manifest(self.read(f"{name}/{version}/{MANIFEST}"), f"{self.url}/{name}/{version}/{MANIFEST}")

    def read(self, path: str) -> bytes:
        """A small file. Raises FileNotFoundError where there is none."""
        found: bytes = self._asked(self.files.cat_file, self._at(path))
        return found

    def write(self, path: str, content: bytes) -> None:
        """A small file, whole or not at all on an object store."""
        self._make_room(path)
        self._asked(self.files.pipe_file, self._at(path), content)

    def fetch(self, name: str, version: int, repository: Path) -> Path:
        """The bundle in a folder that mirrors the store, brought there where it is another or not there: verified, and
        renamed in. Where the store is away, what was brought before is used. Raises DamagedBundle, too."""
        folder = repository / name / str(version)
        try:
            content = self.read(f"{name}/{version}/{MANIFEST}")
        except FileNotFoundError as error:
            raise StorageError(f"{self.url}/{name}/{version} is not there") from error
        except StorageError:
            if (folder / MANIFEST).is_file():
                return folder
            raise
        if (folder / MANIFEST).is_file() and (folder / MANIFEST).read_bytes() == content:
            return folder
        manifest = decoded_manifest(content, f"{self.url}/{name}/{version}/{MANIFEST}")
        with staging(repository) as staged:
            for attempt in (1, 2):
                for file in manifest.files:
                    place = staged / file
                    if not place.resolve().is_relative_to(staged.resolve()):
                        raise DamagedBundle(f"{self.url}/{name}/{version}: {file} is outside the bundle")
                    place.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        self._asked(self.files.get_file, self._at(f"{name}/{version}/{file}"), str(place))
                    except FileNotFoundError as error:
                        raise DamagedBundle(f"{self.url}/{name}/{version}/{file}: missing") from error
                (staged / MANIFEST).write_bytes(content)
                try:
                    verify(staged)
                    break
                except DamagedBundle:
                    if attempt == 2:  # not cut short on its way, but wrong there
                        raise
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():  # of another store, or of a version that was replaced
                old = staged.parent / uuid4().hex
                with suppress(FileNotFoundError):
                    folder.rename(old)
                shutil.rmtree(old, ignore_errors=True)
            with suppress(FileExistsError):  # another process was as fast
                os.rename(staged, folder)
        return folder

    def publish(self, folder: Path, draft: Manifest) -> Manifest:
        """Upload a staging folder as the next version of `draft.name`, whose manifest.json is written into the folder;
        the manifest as published. What the same job has published before is published once."""
        name = draft.name
        there = self.listing().get(name, Listed({}, {})).versions
        if there and draft.lineage.job_id is not None:
            newest = self.manifest(name, max(there))
            if newest.lineage.job_id == draft.lineage.job_id:
                return newest
        token = uuid4().hex.encode()
        while True:
            version = self._claim(name, token)
            manifest = msgspec.structs.replace(draft, version=version)
            content = msgspec.json.format(msgspec.json.encode(manifest))
            for file in manifest.files:
                self._make_room(f"{name}/{version}/{file}")
                self._asked(self.files.put_file, str(folder / file), self._at(f"{name}/{version}/{file}"))
            if self.read(f"{name}/{version}/{CLAIM}") != token:
                continue
            self._asked(self.files.pipe_file, self._at(f"{name}/{version}/{MANIFEST}"), content)
            (folder / MANIFEST).write_bytes(content)
            return manifest

    def _claim(self, name: str, token: bytes) -> int:
        """A version that is nobody else's."""
        self.files.invalidate_cache()
        try:
            paths: list[str] = self._asked(self.files.find, self._at(name))
        except FileNotFoundError:
            paths = []
        numbers = [self._parts(path)[1] for path in paths]
        version = max((int(number) for number in numbers if is_version(number)), default=0)
        while True:
            version += 1
            path = f"{name}/{version}/{CLAIM}"
            self._make_room(path)
            try:
                self._asked(self._create, self._at(path), token)
            except FileExistsError:
                continue
            except StorageError:
                # Drivers say in their own words that there is one already.
                with suppress(FileNotFoundError):
                    if self.read(path) != token:
                        continue
                raise
            if self.read(path) == token:
                return version

    def _create(self, path: str, content: bytes) -> None:
        """Raises FileExistsError, or whatever the driver has for it."""
        if "file" in self.files.protocol:  # whose driver looks first and writes then, which two may do at once
            with open(path, "xb") as stream:
                stream.write(content)
        else:
            self.files.pipe_file(path, content, mode="create")

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _parts(self, path: str) -> list[str]:
        """Of a path in the store, those below the root."""
        return path.removeprefix("/").removeprefix(self.root.removeprefix("/")).strip("/").split("/")

    def _make_room(self, path: str) -> None:
        """Make the folder of a file; object stores have none."""
        if "file" in self.files.protocol:
            self._asked(self.files.makedirs, self._at(path).rpartition("/")[0], exist_ok=True)

    def _asked(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        try:
            return call(*arguments, **options)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # every driver has classes of its own
            raise StorageError(f"{self.url}: {type(error).__name__}: {error}") from error


def mirror(repository: Path, url: str) -> None:
    """Have a folder mirror a store from now on; an empty url: none. Raises StorageError for one that cannot be."""
    marker = repository / MIRROR
    if not url:
        marker.unlink(missing_ok=True)
        return
    Storage(url)
    repository.mkdir(parents=True, exist_ok=True)
    staged = repository / f"{MIRROR}.{uuid4().hex}"
    staged.write_text(url, encoding="utf-8")
    staged.rename(marker)


def storage_of(repository: Path) -> Storage | None:
    """That which a folder mirrors. Raises StorageError."""
    try:
        return Storage((repository / MIRROR).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def pull(repository: Path, references: Iterable[str]) -> None:
    """Bring what training starts from, "name" or "name:version", into a folder that mirrors a store; what is not
    published there is no business of ours. Raises StorageError, DamagedBundle."""
    storage = storage_of(repository)
    if storage is None:
        return
    there = storage.listing()
    for reference in references:
        name, _, number = reference.partition(":")
        versions = there[name].versions if name in there else {}
        version = int(number) if is_version(number) else max(versions, default=0)
        if version in versions:
            storage.fetch(name, version, repository)


def is_version(name: str) -> bool:
    return name.isascii() and name.isdecimal()
