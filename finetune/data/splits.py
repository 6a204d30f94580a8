"""Training, validation and test items: stratified, seeded, the same content never on two sides."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from finetune.data.datasets import Dataset
from finetune.recipe import Data


@dataclass(frozen=True)
class Splits:
    """Item numbers, int64, ascending. `test` is empty when none was asked for."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split(dataset: Dataset, data: Data, seed: int, validation: bool = True) -> Splits:
    """Divide the items of every class by the shares in `data`.

    Which side an item falls on follows from its content and the seed, not from its place in the file. Every class
    with two different items gets one to train and one to validate on; with three, and a test share, one to test on.
    validation: False when a validation file stands beside this one; then only the test share is taken off.
    """
    groups: dict[bytes, list[int]] = {}
    for item in range(len(dataset)):
        groups.setdefault(dataset.digest(item), []).append(item)
    by_class: dict[int, list[bytes]] = {}
    for content, items in groups.items():
        by_class.setdefault(int(dataset.answers.strata[items[0]]), []).append(content)
    key = seed.to_bytes(8, "little")
    sides: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for contents in by_class.values():
        contents.sort(key=lambda content: hashlib.blake2b(content, key=key).digest())
        spare = len(contents) - 1  # one is always for training
        held = min(max(round(len(contents) * data.validation), 1), spare) if validation else 0
        tested = min(max(round(len(contents) * data.test), 1), spare - held) if data.test else 0
        for i, content in enumerate(contents):
            side = "validation" if i < held else "test" if i < held + tested else "train"
            sides[side] += groups[content]
    return Splits(**{side: np.array(sorted(items), np.int64) for side, items in sides.items()})


def leakage(one: Dataset, other: Dataset) -> list[tuple[str, str]]:
    """Places in `one` and in `other` that hold the same content."""
    places = {one.digest(item): one.place(item) for item in range(len(one))}
    return [
        (places[other.digest(item)], other.place(item)) for item in range(len(other)) if other.digest(item) in places
    ]
