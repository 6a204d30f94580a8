"""A bundle becomes visible by one rename, whole or not at all.

Files are gathered in `<repository>/.staging/<random>/`, flushed to the disk, and the folder is renamed to
`<repository>/<name>/<next version>/`. A publisher that is killed leaves a staging folder that nobody sees; it holds a
lock on the folder for as long as it lives, so `sweep` can tell dead staging from staging in use.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import msgspec

from export.bundle import MANIFEST, Manifest, sha256_of, versions

STAGING = ".staging"


@contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """A new, empty staging folder; gone at the end, unless `publish` has renamed it."""
    while True:
        folder = repository / STAGING / uuid4().hex
        folder.mkdir(parents=True)
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.is_dir():  # else a sweep came between making and locking it
            break
        os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def publish(folder: Path, repository: Path, draft: Manifest) -> Manifest:
    """Make a staging folder the next version of `draft.name`; the manifest as published.

    Version and file digests are filled in here. Of two publishers at once each gets a version of its own.
    """
    files = {
        str(path.relative_to(folder)): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    for name in files:
        flush(folder / name)
    for inside in filter(Path.is_dir, folder.rglob("*")):
        flush(inside)
    home = repository / draft.name
    home.mkdir(parents=True, exist_ok=True)
    flush(repository)
    while True:
        taken = versions(repository, draft.name)
        manifest = msgspec.structs.replace(draft, version=max(taken, default=0) + 1, files=files)
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        flush(folder / MANIFEST)
        flush(folder)
        try:
            os.rename(folder, home / str(manifest.version))
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                continue  # another publisher took this version
            raise
        flush(home)
        return manifest


def sweep(repository: Path) -> None:
    """Remove the staging folders of publishers that are no more."""
    for folder in (repository / STAGING).glob("*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:
            continue  # its publisher has just finished
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its publisher lives
        finally:
            os.close(descriptor)


def flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
