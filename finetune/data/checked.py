"""Every item read once: which are broken, which occur twice, which contradict each other."""

from __future__ import annotations

import hashlib
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.processing.images import open_image
from export.processing.inputs import BadInput
from finetune.data.chats import digests
from finetune.data.items import MOST_CHARACTERS, Source
from finetune.data.problems import BadFile, Problem
from finetune.data.targets import MISSING

AT_ONCE = 4096


@dataclass(frozen=True)
class Checked:
    """`good`: numbers of the usable items. `digests`: content of each item, None for a broken one.

    duplicates: (item, the earlier item with the same content and label).
    """

    good: list[int]
    digests: list[bytes | None]
    problems: list[Problem]
    duplicates: list[tuple[int, int]]


def check(source: Source) -> Checked:
    """Read every item, images to their last pixel. An item without a label, broken, or whose content also occurs with
    another label, is a problem; two numbers measured of the same thing may well differ, as may two translations, or
    two answers of the same question, which is the content of a conversation."""

    def judge(i: int) -> tuple[bytes, bytes] | str:
        """Digests of the content, and of all that makes the item what it is."""
        try:
            content, label = source.read(i), source.labels[i]
            if label is None:
                return MISSING[source.wanted.kind]
            if source.wanted.kind == "text" and len(label) > MOST_CHARACTERS:
                return f"the translation has {len(label):,} characters; at most {MOST_CHARACTERS:,} are taken"
            if source.kind == "images":
                _decode(content)
            if source.wanted.kind == "chat":
                return digests(content)
            found = digest(content)
            return found, digest(found + label.encode()) if source.wanted.kind == "text" else found
        except (BadFile, BadInput) as error:
            return str(error)

    items = range(len(source))
    found: list[tuple[bytes, bytes] | str] = []
    if source.kind == "images":
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(items), AT_ONCE):  # a future for each of millions would fill the memory
                found += pool.map(judge, items[start : start + AT_ONCE])
    else:
        found += map(judge, items)
    problems = list(source.strays)
    first: dict[bytes, int] = {}
    duplicates: list[tuple[int, int]] = []
    contradicted: set[int] = set()
    for i, result in enumerate(found):
        if isinstance(result, str):
            problems.append(Problem(source.places[i], result))
            continue
        label = source.labels[i] or ""
        earlier = first.setdefault(result[1], i)
        if earlier == i:
            continue
        if label != source.labels[earlier] and source.wanted.kind in ("class", "set"):
            contradicted.add(i)
            other = f"{source.places[earlier]}, labelled {source.labels[earlier]!r}"
            problems.append(Problem(source.places[i], f"labelled {label!r}, but the same content is {other}"))
        else:
            duplicates.append((i, earlier))
    contents = [None if isinstance(result, str) else result[0] for result in found]
    good = [i for i, result in enumerate(found) if not isinstance(result, str) and i not in contradicted]
    return Checked(good, contents, problems, duplicates)


def digest(content: Any) -> bytes:
    """SHA-256 of an image's bytes, a text, or the numbers of a vector or a series."""
    if isinstance(content, np.ndarray):
        content = repr(content.shape).encode() + content.tobytes()
    if isinstance(content, list):
        content = struct.pack(f"<{len(content)}d", *content)
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).digest()


def _decode(data: bytes) -> None:
    image = open_image(data)
    try:
        image.draft("L", (32, 32))  # a JPEG's every byte is still read, its pixels are computed at an eighth
        image.load()
    except Exception as error:  # Pillow's decoders raise what they like
        raise BadFile(f"the image is damaged: {error}") from error
