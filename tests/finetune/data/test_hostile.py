"""Files made to do harm, and files that were damaged on the way: refused with words, without harm, without silence."""

from __future__ import annotations

import gzip
import io
import json
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pyarrow
import pytest
from pyarrow import parquet

from finetune.data import archives
from finetune.data.problems import BadFile
from finetune.data.validation import inspect
from tests.finetune.data.made import FOLDERS, png, tarred, written, zipped


def special_zip(path: Path, kind: int) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("cat/link")
        member.external_attr = (kind | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    return path


def special_tar(path: Path, kind: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("cat/link")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    return path


def encrypted(path: Path) -> Path:
    content = bytearray(zipped(path, FOLDERS).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return written(path, bytes(content))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def twice(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for content in (png(1), png(2)):
            archive.writestr("cat/1.png", content)
    return path


def nameless(path: Path) -> Path:
    return written(path, zipped(path, {"@": b"x"}).read_bytes().replace(b"@", b"\0"))


def tarred_twice(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in (("cat/1.png", png(1)), ("./cat/1.png", png(2))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def foreign_names(path: Path) -> Path:
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo("café/1.png")
        archive.addfile(member)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: zipped(p, {"../evil.png": b"x"}), "leads out"),
        (lambda p: zipped(p, {"/evil.png": b"x"}), "leads out"),
        (lambda p: zipped(p, {"C:/evil.png": b"x"}), "leads out"),
        (lambda p: zipped(p, {"a\\..\\..\\evil.png": b"x"}), "leads out"),
        (lambda p: tarred(p, {"../evil.png": b"x"}, "w"), "leads out"),
        (lambda p: tarred(p, {"/evil.png": b"x"}, "w:gz"), "leads out"),
        (lambda p: special_zip(p, stat.S_IFLNK), "link or special file"),
        (lambda p: special_zip(p, stat.S_IFCHR), "link or special file"),
        (lambda p: special_tar(p, tarfile.SYMTYPE), "link or special file"),
        (lambda p: special_tar(p, tarfile.LNKTYPE), "link or special file"),
        (lambda p: special_tar(p, tarfile.CHRTYPE), "link or special file"),
        (lambda p: special_tar(p, tarfile.FIFOTYPE), "link or special file"),
        (encrypted, "encrypted"),
        (twice, "cat/1.png: is in the archive twice"),
        (tarred_twice, "cat/1.png: is in the archive twice"),
        (nameless, "without a name"),
        (foreign_names, "not UTF-8"),
        (lambda p: zipped(p, FOLDERS, zipfile.ZIP_LZMA), "method 14; make the zip with deflate"),
        (lambda p: zipped(p, {"cat/bomb.png": bytes(30_000_000)}), "bomb"),
        (lambda p: zipped(p, {f"cat/{i}.png": bytes(5_000_000) for i in range(6)}), "bomb"),
        (lambda p: tarred(p, {"cat/bomb.png": bytes(30_000_000)}, "w:gz"), "bomb"),
        (lambda p: tarred(p, {"cat/bomb.png": bytes(30_000_000)}, "w:xz"), "bomb"),
        (lambda p: written(p, b""), "empty"),
        (lambda p: written(p, zipped(p, FOLDERS).read_bytes()[:-30]), "cut off"),
        (lambda p: written(p, tarred(p, FOLDERS, "w:gz").read_bytes()[:-30]), "cut off"),
        (lambda p: written(p, gzip.compress(b"text,label\na,b\n")), "not a tar archive"),
        (lambda p: zipped(p, {"cat/1.png": b"no image", "dog/1.png": b"none"}), "no item can be used"),
        (lambda p: zipped(p, {}), "no files"),
    ],
)
def test_dangerous_and_useless_archives_are_refused(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path / "x.zip")
    with pytest.raises(BadFile, match=words):
        inspect(path, "x.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def test_the_size_of_all_members_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_BYTES", 500)
    for path in (zipped(tmp_path / "x.zip", FOLDERS), tarred(tmp_path / "x.tar", FOLDERS, "w")):
        with pytest.raises(BadFile, match="more than 500"):
            inspect(path, path.name)


def test_a_member_that_lies_about_its_size_costs_no_memory(tmp_path: Path) -> None:
    size = 200_000_000
    path = zipped(tmp_path / "x.zip", {**FOLDERS, "cat/lie.png": bytes(size)})
    written(path, path.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", 1000)))
    tracemalloc.start()
    try:
        report = inspect(path, "x.zip")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [problem.place for problem in report.problems] == ["cat/lie.png"]
    assert peak < size / 10


def test_an_image_of_too_many_pixels_and_an_archive_inside_are_not_unpacked(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT"
    inside = zipped(tmp_path / "inside.zip", FOLDERS).read_bytes()
    report = inspect(zipped(tmp_path / "x.zip", {**FOLDERS, "cat/big.png": bomb, "dog/inside.zip": inside}), "x.zip")
    assert report.classes == {"cat": 5, "dog": 5}
    messages = {problem.place: problem.message for problem in report.problems}
    assert messages.keys() == {"cat/big.png", "dog/inside.zip"}
    assert "50,000,000" in messages["cat/big.png"]


@pytest.mark.parametrize("damage", ["header", "cut between members", "cut inside a member"])
def test_a_tar_damaged_in_the_middle_is_not_taken_for_a_shorter_one(tmp_path: Path, damage: str) -> None:
    path = tarred(tmp_path / "x.tar", FOLDERS, "w")
    with tarfile.open(path) as archive:
        member = archive.getmembers()[6]
    content = path.read_bytes()
    damaged = {
        "header": content[: member.offset] + b"x" * 512 + content[member.offset_data :],
        "cut between members": content[: member.offset],
        "cut inside a member": content[: member.offset_data + 10],
    }
    with pytest.raises(BadFile, match="damaged or cut off"):
        inspect(written(path, damaged[damage]), "x.tar")


def test_a_parquet_file_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    texts = pyarrow.array(["x" * 100_000]).dictionary_encode()
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10_000, pyarrow.int32()), texts.dictionary)
    parquet.write_table(
        pyarrow.table({"text": repeated.cast(pyarrow.string()), "label": ["a"] * 10_000}), tmp_path / "x"
    )
    assert (tmp_path / "x").stat().st_size < 1_000_000
    with pytest.raises(BadFile, match="compression bomb"):
        inspect(tmp_path / "x", "x.parquet")


def broken_utf8(path: Path) -> Path:
    offsets, content = pyarrow.py_buffer(struct.pack("<3i", 0, 2, 3)), pyarrow.py_buffer(b"\xff\xfea")
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, content])
    parquet.write_table(pyarrow.table({"text": texts, "label": ["x", "y"]}), path)
    return path


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("x.parquet", broken_utf8, "can't decode"),
        ("x.jsonl", lambda p: written(p, '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"), "line 1: .*recursion"),
        ("x.jsonl", lambda p: written(p, '{"text": "\\ud800", "label": "a"}'), "line 1: .*surrogate"),
        ("x.jsonl", lambda p: written(p, '{"a": ' + "9" * 5000 + ', "label": "a"}'), "line 1: .*out of range"),
        ("x.csv", lambda p: written(p, "text,label\n" + "a" * 80_000_000 + ",b\n"), "longer than|never closed"),
    ],
)
def test_tables_that_break_their_readers_are_refused(
    tmp_path: Path, name: str, make: Callable[[Path], Path], words: str
) -> None:
    with pytest.raises(BadFile, match=words):
        inspect(make(tmp_path / name), name)


def test_whatever_is_damaged_is_refused_with_words_or_read(tmp_path: Path) -> None:
    rows = [{"text": f"a text {i} é", "label": i % 3} for i in range(30)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    whole = {
        "x.zip": zipped(tmp_path / "x.zip", FOLDERS).read_bytes(),
        "x.tar": tarred(tmp_path / "x.tar", FOLDERS, "w").read_bytes(),
        "x.tgz": tarred(tmp_path / "x.tgz", FOLDERS, "w:gz").read_bytes(),
        "x.csv": "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows).encode(),
        "x.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "x.parquet": (tmp_path / "x.parquet").read_bytes(),
    }
    numbers = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1200):
        name = numbers.choice(list(whole))
        content = bytearray(whole[name])
        for _ in range(numbers.choice((1, 3, 10))):
            # Formats keep what is most easily broken at their ends.
            place = numbers.choice((numbers.randrange(len(content)), -numbers.randrange(1, min(300, len(content)))))
            content[place] = numbers.randrange(256)
        if numbers.random() < 0.2:
            del content[numbers.randrange(8, len(content)) :]
        try:
            msgspec.json.encode(inspect(written(tmp_path / name, bytes(content)), name))
            outcomes["read"] += 1
        except BadFile:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
