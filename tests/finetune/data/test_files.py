"""The file store: whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from finetune.data.files import FileStore, TooLarge


async def chunks(*pieces: bytes, end: Exception | None = None) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    if end is not None:
        raise end


def left(root: Path) -> list[str]:
    return [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]


def test_a_file_is_stored_with_its_digest(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    received = asyncio.run(store.receive(chunks(b"ab", b"", b"c" * 3_000_000), 10**9))
    path = store.accept(received)
    content = b"ab" + b"c" * 3_000_000
    assert path.read_bytes() == content
    assert received.bytes == len(content)
    assert received.sha256 == hashlib.sha256(content).hexdigest()
    assert store.path(received.id) == path
    store.delete(received.id)
    assert left(tmp_path) == []


def test_a_file_beyond_the_limit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="1,000"):
        asyncio.run(FileStore(tmp_path).receive(chunks(b"x" * 600, b"x" * 600), 1000))
    assert left(tmp_path) == []


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        asyncio.run(FileStore(tmp_path).receive(chunks(b"x", end=ConnectionError()), 1000))
    assert left(tmp_path) == []


UPLOADER = """
import asyncio, sys, time
from pathlib import Path
from finetune.data.files import FileStore

async def chunks():
    yield b"x" * 2_000_000
    print("half way", flush=True)
    await asyncio.sleep(60)

asyncio.run(FileStore(Path(sys.argv[1])).receive(chunks(), 10**9))
"""


def test_what_a_killed_server_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    kept = asyncio.run(store.receive(chunks(b"kept"), 100))
    store.accept(kept)
    orphan = asyncio.run(store.receive(chunks(b"no row in the job store"), 100))
    store.accept(orphan)
    process = subprocess.Popen([sys.executable, "-c", UPLOADER, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half way\n"
    store.sweep([kept.id])
    assert len(left(tmp_path)) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.sweep([kept.id])
    assert left(tmp_path) == [f"{kept.id}/content"]
