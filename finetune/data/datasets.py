"""A data set as training sees it: usable items only, each with its target, read when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.checked import check
from finetune.data.items import Kind, Source, open_file, source_of
from finetune.data.problems import BadFile, Problem
from finetune.recipe import Data

MOST_BROKEN = 0.1


@dataclass(frozen=True)
class Dataset:
    """labels: sorted; targets: int64 [items], their numbers. problems: of the items left out."""

    source: Source
    rows: Sequence[int]
    digests: Sequence[bytes]
    labels: list[str]
    targets: np.ndarray
    problems: list[Problem]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def kind(self) -> Kind:
        return self.source.kind

    @property
    def features(self) -> list[str]:
        """Names of a vector's numbers; empty for images and texts."""
        return self.source.features

    def content(self, item: int) -> Any:
        """Bytes of an image file, a str, a list of float, or for a series float64 [length, channels]."""
        return self.source.read(self.rows[item])

    def place(self, item: int) -> str:
        """Where the item stands in the file."""
        return self.source.places[self.rows[item]]

    def digest(self, item: int) -> bytes:
        """Equal for items of equal content."""
        return self.digests[item]


def open_dataset(path: Path, filename: str, data: Data, labels: Sequence[str] | None = None) -> Dataset:
    """The usable items of a file.

    labels: those of the training file, for a validation file. Raises BadFile when more than a tenth of the items is
    broken, when there is one class only, and for a label that is not among `labels`.
    """
    source = source_of(open_file(path, filename), filename, data)
    if not len(source):
        raise BadFile(f"{filename}: holds no items")
    checked = check(source)
    if len(checked.good) < (1.0 - MOST_BROKEN) * len(source):
        first = checked.problems[0]
        raise BadFile(
            f"{filename}: {len(source) - len(checked.good)} of {len(source)} items cannot be used, more than a tenth; "
            f"the first: {first.place}: {first.message}"
        )
    written = [str(source.labels[i]) for i in checked.good]
    if labels is None:
        labels = sorted(set(written))
        if len(labels) < 2:
            raise BadFile(f"{filename}: only one class, {', '.join(labels) or 'none'}; a classifier needs at least two")
    number = {label: i for i, label in enumerate(labels)}
    for i, label in zip(checked.good, written, strict=True):
        if label not in number:
            raise BadFile(f"{filename}: {source.places[i]}: label {label!r} does not occur in the training file")
    return Dataset(
        source=source,
        rows=checked.good,
        digests=[digest for i in checked.good if (digest := checked.digests[i]) is not None],
        labels=list(labels),
        targets=np.array([number[label] for label in written], np.int64),
        problems=checked.problems,
    )
