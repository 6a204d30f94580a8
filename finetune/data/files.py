"""Uploaded files on disk: `<root>/<id>/content`, whole or not there at all.

An upload is written to `<root>/.uploading/<id>` under a lock and renamed when it is complete and has been accepted;
`sweep` removes what a killed server left behind.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

UPLOADING = ".uploading"
WRITE_BYTES = 2**20


class TooLarge(Exception):
    """An upload grew beyond the limit; the message names it."""


@dataclass(frozen=True)
class Received:
    """A complete upload, not yet accepted: it lies at `path`."""

    id: str
    path: Path
    bytes: int
    sha256: str


class FileStore:
    """The files under one folder. Knows nothing of their names and purposes: those are in the job store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / UPLOADING).mkdir(parents=True, exist_ok=True)

    async def receive(self, chunks: AsyncIterator[bytes], limit_bytes: int) -> Received:
        """Write an upload as it arrives; memory holds a megabyte of it. Raises TooLarge, and whatever `chunks` raises;
        then nothing is left."""
        file_id = f"file-{uuid4().hex[:24]}"
        path = self.root / UPLOADING / file_id
        digest, size, waiting = hashlib.sha256(), 0, bytearray()
        try:
            with path.open("xb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)

                def write(data: bytes) -> None:
                    digest.update(data)
                    stream.write(data)

                async for chunk in chunks:
                    size += len(chunk)
                    if size > limit_bytes:
                        raise TooLarge(f"the file is larger than {limit_bytes:,} bytes, the largest this server takes")
                    waiting += chunk
                    if len(waiting) >= WRITE_BYTES:
                        await asyncio.to_thread(write, bytes(waiting))
                        waiting.clear()

                def finish() -> None:
                    write(bytes(waiting))
                    stream.flush()
                    os.fsync(stream.fileno())

                await asyncio.to_thread(finish)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return Received(file_id, path, size, digest.hexdigest())

    def accept(self, received: Received) -> Path:
        """Make a received file a stored one; its path."""
        folder = self.root / received.id
        folder.mkdir()
        os.rename(received.path, folder / "content")
        for place in (folder, self.root):
            descriptor = os.open(place, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return folder / "content"

    def refuse(self, received: Received) -> None:
        """Remove a received file."""
        received.path.unlink(missing_ok=True)

    def path(self, file_id: str) -> Path:
        """Where the content of a stored file lies."""
        return self.root / file_id / "content"

    def delete(self, file_id: str) -> None:
        """Remove a stored file; nothing happens when it is not there."""
        shutil.rmtree(self.root / file_id, ignore_errors=True)

    def sweep(self, known: Collection[str]) -> None:
        """Remove uploads that nobody writes any more, and stored files that the job store does not know."""
        for path in (self.root / UPLOADING).iterdir():
            with suppress(OSError), path.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        for folder in self.root.glob("file-*"):
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
