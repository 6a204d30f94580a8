"""Staging folders: where a bundle is gathered before it becomes visible by a rename.

Whoever fills one holds a lock on it for as long as it lives, so `sweep` can tell dead staging from staging in use.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

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
