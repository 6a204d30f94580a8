"""A bundle becomes visible by one rename, whole or not at all.

Files are gathered in `<repository>/.staging/<random>/`, flushed to the disk, and the folder is renamed to
`<repository>/<name>/<next version>/`. A publisher that is killed leaves a staging folder that nobody sees. Where the
repository mirrors object storage, the bundle is uploaded there, and then renamed in here.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from export.bundle import MANIFEST, Manifest, sha256_of, versions
from export.storage import storage_of


def publish(folder: Path, repository: Path, draft: Manifest) -> Manifest:
    """Make a staging folder the next version of `draft.name`; the manifest as published.

    Version and file digests are filled in here. Of two publishers at once each gets a version of its own. Raises
    StorageError where the repository mirrors object storage that fails.
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
    if (storage := storage_of(repository)) is not None:
        manifest = storage.publish(folder, msgspec.structs.replace(draft, files=files))
        if (folder / MANIFEST).is_file():
            with suppress(OSError):  # it is here already, or it will be fetched
                os.rename(folder, home / str(manifest.version))
        return manifest
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


def flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
