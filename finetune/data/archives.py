"""Zip and tar archives, read one member at a time and never unpacked by name.

Everything that could hurt is refused when the archive is opened: paths that leave it, links and devices, encryption,
two members of one name, members that would unpack to far more than they take. Archives inside are not looked into.
"""

from __future__ import annotations

import gzip
import lzma
import os
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
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
HIDDEN = ("Thumbs.db", "desktop.ini")
TAR_BLOCK = 512
# What Python's readers raise on damaged bytes.
DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(OSError, EOFError, ValueError, RuntimeError, OverflowError),
)

COMPRESSED: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": lambda stream: cast(IO[bytes], gzip.GzipFile(fileobj=stream)),
    b"BZh": BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}


class Archive:
    """`members`: names of the files in it, in order, "/" between folders, hidden ones left out. Threads may share it.

    form: "zip" or "tar".
    """

    def __init__(self, members: list[str], read: Callable[[str], bytes], form: str) -> None:
        self.members = members
        self.form = form
        self._read = read

    def read(self, member: str) -> bytes:
        """The bytes of a member. Raises BadFile when they are damaged."""
        try:
            return self._read(member)
        except DAMAGE as error:
            raise BadFile(f"{member}: damaged: {error}") from error


class Listing:
    """The members of an archive as it is opened, each checked when it is added."""

    def __init__(self, most_bytes: int) -> None:
        self.names: dict[str, None] = {}
        self.bytes = 0
        self._most_bytes = most_bytes

    def add(self, name: str, size: int) -> str:
        """The name to read a member by. Raises BadFile when it is dangerous or there already."""
        clean = safe(name)
        if clean == ".":
            raise BadFile("the archive has a file without a name")
        if size > MOST_MEMBER_BYTES:
            raise BadFile(f"{name}: {size:,} bytes; a member may have at most {MOST_MEMBER_BYTES:,}")
        if clean in self.names:
            raise BadFile(f"{name}: is in the archive twice; which one is meant cannot be known")
        if len(self.names) >= MOST_MEMBERS:
            raise BadFile(f"the archive has more than {MOST_MEMBERS:,} members")
        self.bytes += size
        if self.bytes > self._most_bytes:
            raise BadFile(
                f"the archive unpacks to more than {self._most_bytes:,} bytes; too large, or a compression bomb"
            )
        self.names[clean] = None
        return clean

    def visible(self) -> list[str]:
        return [name for name in self.names if not _hidden(name)]


def open_archive(path: Path) -> Archive | None:
    """The archive at `path`, told by its bytes, or None when it is none. Raises BadFile when it is a dangerous one."""
    with path.open("rb") as stream:
        head = stream.read(6)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _zip(path)
    for magic, opener in COMPRESSED.items():
        if head.startswith(magic):
            return _tar(_decompressed(path, opener))
    if tarfile.is_tarfile(path):
        return _tar(path.open("rb"))
    return None


def _zip(path: Path) -> Archive:
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as error:
        raise BadFile(f"the zip archive is damaged or cut off: {error}") from error
    listing = Listing(_most_bytes(path))
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        if member.filename.endswith("/"):
            safe(member.filename)
            continue
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise BadFile(f"{member.filename}: a link or special file; an archive may hold plain files only")
        if member.flag_bits & 1:
            raise BadFile(f"{member.filename}: encrypted; send an archive without a password")
        # The other methods cannot be unpacked bit by bit, so a lie about the size would be found out too late.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadFile(f"{member.filename}: packed by method {member.compress_type}; make the zip with deflate")
        if member.file_size > max(RATIO_FROM_BYTES, MOST_RATIO * member.compress_size):
            raise BadFile(
                f"{member.filename}: {member.compress_size:,} bytes would unpack to {member.file_size:,}; "
                "refused as a compression bomb"
            )
        members[listing.add(member.filename, member.file_size)] = member

    def read(name: str) -> bytes:
        member = members[name]
        with archive.open(member) as stream:
            return stream.read(member.file_size)  # with a bound: without, the declared size is not kept to

    return Archive(listing.visible(), read, "zip")


def _tar(stream: IO[bytes]) -> Archive:
    listing = Listing(MOST_BYTES)
    places: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    safe(member.name)
                    continue
                if not member.isreg() or member.issparse():
                    raise BadFile(f"{member.name}: a link or special file; an archive may hold plain files only")
                places[listing.add(member.name, member.size)] = (member.offset_data, member.size)
            end = archive.offset
    except BadFile:
        raise
    except DAMAGE as error:
        raise BadFile(f"the tar archive is damaged or cut off: {error}") from error
    # tarfile takes a header that it cannot read for the end, and would leave out all that follows.
    if os.pread(stream.fileno(), TAR_BLOCK, end) != bytes(TAR_BLOCK):
        raise BadFile(f"the tar archive is damaged or cut off at byte {end:,}, after {len(listing.names):,} files")

    def read(name: str) -> bytes:
        offset, length = places[name]
        return os.pread(stream.fileno(), length, offset)

    return Archive(listing.visible(), read, "tar")


def _decompressed(path: Path, opener: Callable[[IO[bytes]], IO[bytes]]) -> IO[bytes]:
    """A compressed tar unpacked into a nameless temporary file: compressed streams cannot be read at random."""
    limit = _most_bytes(path)
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - the archive reads from it for as long as it lives
    try:
        with path.open("rb") as packed, opener(packed) as stream:
            while piece := stream.read(2**20):
                unpacked.write(piece)
                if unpacked.tell() > limit:
                    raise BadFile(f"the archive unpacks to more than {limit:,} bytes; refused as a compression bomb")
    except BadFile:
        raise
    except DAMAGE as error:
        raise BadFile(f"the compressed archive is damaged or cut off: {error}") from error
    unpacked.flush()
    unpacked.seek(0)
    if not tarfile.is_tarfile(unpacked):
        raise BadFile("compressed, but not a tar archive; send tables as they are, images as a zip or tar")
    unpacked.seek(0)
    return unpacked


def _most_bytes(path: Path) -> int:
    """What an archive of this size may unpack to."""
    return min(MOST_BYTES, max(RATIO_FROM_BYTES, MOST_RATIO * path.stat().st_size))


def safe(name: str) -> str:
    """The name with "/" between its parts and nothing else. Raises BadFile when it leads out of the archive."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or name[1:2] == ":":
        raise BadFile(f"{name!r}: the path leads out of the archive; use plain relative paths")
    if "\x00" in name:
        raise BadFile(f"{name!r}: a name with a zero byte")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadFile(f"{name!a}: the name is not UTF-8; make the archive with UTF-8 names") from error
    return str(path)


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) or part in HIDDEN for part in PurePosixPath(name).parts)
