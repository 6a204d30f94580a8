"""A data set as training sees it: usable items only, each with its target, read when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data import targets
from finetune.data.checked import check
from finetune.data.items import Kind, Source, open_file, source_of
from finetune.data.problems import BadFile, Problem
from finetune.data.targets import Targets
from finetune.data.wanted import Wanted, wanted_of
from finetune.recipe import CrossEntropy, Data

MOST_BROKEN = 0.1


@dataclass(frozen=True)
class Dataset:
    """targets: of the usable items (`finetune.data.targets`). problems: of the items left out."""

    source: Source
    rows: Sequence[int]
    digests: Sequence[bytes]
    answers: Targets
    problems: list[Problem]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def kind(self) -> Kind:
        return self.source.kind

    @property
    def labels(self) -> list[str]:
        """Of the classes, or names of the numbers; empty for several heads and for nothing."""
        return self.answers.labels

    @property
    def targets(self) -> np.ndarray:
        """[items, ...], as `finetune.data.targets.Targets.values`."""
        return self.answers.values

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


def open_dataset(
    path: Path,
    filename: str,
    data: Data,
    wanted: Wanted | None = None,
    known: Targets | None = None,
    features: Sequence[str] = (),
) -> Dataset:
    """The usable items of a file.

    wanted: which columns are learned, as classes in the label column when None. known: the targets of the training
    file, for a validation file; features: the columns of its vectors. Raises BadFile when more than a tenth of the
    items is broken, when there is one class only, and for a label that the training file lacks.
    """
    wanted = wanted or wanted_of(CrossEntropy(), data)
    source = source_of(open_file(path, filename), filename, data, wanted, features)
    if not len(source):
        raise BadFile(f"{filename}: holds no items")
    checked = check(source)
    if len(checked.good) < (1.0 - MOST_BROKEN) * len(source):
        first = checked.problems[0]
        raise BadFile(
            f"{filename}: {len(source) - len(checked.good)} of {len(source)} items cannot be used, more than a tenth; "
            f"the first: {first.place}: {first.message}"
        )
    try:
        answers = targets.read(
            [source.answers[i] for i in checked.good],
            source.wanted,
            known,
            lambda row: source.places[checked.good[row]],
        )
    except BadFile as error:
        raise BadFile(f"{filename}: {error}") from error
    return Dataset(
        source=source,
        rows=checked.good,
        digests=[digest for i in checked.good if (digest := checked.digests[i]) is not None],
        answers=answers,
        problems=checked.problems,
    )
