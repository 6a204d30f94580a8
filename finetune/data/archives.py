"""Zip and tar archives, read one member at a time and never unpacked by name.

Everything that could hurt is refused when the archive is opened: paths that leave it, links and devices, encryption,
members that would unpack to far more than they take.
"""

from __future__ import annotations

import gzip
import lzma
import os
import stat
import tarfile
import tempfile
import zipfile
from bz2 import BZ2File
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, cast

from finetune.data.problems import BadFile

MOST_BYTES = 20 * 2**30
MOST_MEMBER_BYTES = 256 * 2**20
MOST_MEMBERS = 5_000_000
# Text and flat images shrink to 1/100; only what was made for it shrinks beyond 1/200 at this size.
MOST_RATIO = 200
RATIO_FROM_BYTES = 10 * 2**20

COMPRESSED: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": lambda stream: cast(IO[bytes], gzip.GzipFile(fileobj=stream)),
    b"BZh": BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}


class Archive:
    """`members`: names of the files in it, in order, hidden ones left out. Threads may share it."""

    def __init__(self, members: list[str], read: Callable[[str], bytes], form: str) -> None:
        self.members = members
        self.form = form
        self._read = read

    def read(self, member: str) -> bytes:
        """The bytes of a member. Raises BadFile when they are damaged."""
        try:
            return self._read(member)
        except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise BadFile(f"{member}: damaged: {error}") from error


def open_archive(path: Path) -> Archive | None:
    """The archive at `path`, told by its bytes, or None when it is none. Raises BadFile when it is a dangerous one."""
    with path.open("rb") as stream:
        head = stream.read(6)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _zip(path)
    for magic, opener in COMPRESSED.items():
        if head.startswith(magic):
            return _tar(_decompressed(path, opener), "tar")
    if tarfile.is_tarfile(path):
        return _tar(path.open("rb"), "tar")
    return None


def _zip(path: Path) -> Archive:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BadFile(f"the zip archive is damaged or cut off: {error}") from error
    names: list[str] = []
    total = 0
    for member in archive.infolist():
        if member.is_dir():
            _safe(member.filename)
            continue
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise BadFile(f"{member.filename}: a link or special file; an archive may hold plain files only")
        if member.flag_bits & 1:
            raise BadFile(f"{member.filename}: encrypted; send an archive without a password")
        if member.file_size > max(RATIO_FROM_BYTES, MOST_RATIO * member.compress_size):
            raise BadFile(
                f"{member.filename}: {member.compress_size:,} bytes would unpack to {member.file_size:,}; "
                "refused as a compression bomb"
            )
        total = _counted(member.filename, member.file_size, total, names)
    return Archive(names, archive.read, "zip")


def _tar(stream: IO[bytes], form: str) -> Archive:
    places: dict[str, tuple[int, int]] = {}
    names: list[str] = []
    total = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    _safe(member.name)
                    continue
                if not member.isreg():
                    raise BadFile(f"{member.name}: a link or special file; an archive may hold plain files only")
                total = _counted(member.name, member.size, total, names)
                places[member.name] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise BadFile(f"the tar archive is damaged or cut off: {error}") from error
    size = os.fstat(stream.fileno()).st_size

    def read(name: str) -> bytes:
        offset, length = places[name]
        if offset + length > size:
            raise ValueError("the archive is cut off inside it")
        return os.pread(stream.fileno(), length, offset)

    return Archive(names, read, form)


def _decompressed(path: Path, opener: Callable[[IO[bytes]], IO[bytes]]) -> IO[bytes]:
    """A compressed file unpacked into a nameless temporary one: compressed streams cannot be read at random."""
    limit = min(MOST_BYTES, max(RATIO_FROM_BYTES, MOST_RATIO * path.stat().st_size))
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - the archive reads from it for as long as it lives
    try:
        with path.open("rb") as packed, opener(packed) as stream:
            while piece := stream.read(2**20):
                unpacked.write(piece)
                if unpacked.tell() > limit:
                    raise BadFile(f"the archive unpacks to more than {limit:,} bytes; refused as a compression bomb")
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise BadFile(f"the compressed archive is damaged or cut off: {error}") from error
    unpacked.flush()
    unpacked.seek(0)
    return unpacked


def _counted(name: str, size: int, total: int, names: list[str]) -> int:
    """Check a member and list it if it is not hidden; the bytes of all members so far."""
    _safe(name)
    if size > MOST_MEMBER_BYTES:
        raise BadFile(f"{name}: {size:,} bytes; a member may have at most {MOST_MEMBER_BYTES:,}")
    if total + size > MOST_BYTES:
        raise BadFile(f"the archive unpacks to more than {MOST_BYTES:,} bytes")
    if len(names) >= MOST_MEMBERS:
        raise BadFile(f"the archive has more than {MOST_MEMBERS:,} members")
    parts = PurePosixPath(name).parts
    if not any(part.startswith((".", "__MACOSX")) or part == "Thumbs.db" for part in parts):
        names.append(name)
    return total + size


def _safe(name: str) -> None:
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts or name[1:2] == ":":
        raise BadFile(f"{name!r}: the path leads out of the archive; use plain relative paths")
    if "\x00" in name:
        raise BadFile(f"{name!r}: a name with a zero byte")
