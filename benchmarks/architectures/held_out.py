"""The items of a run as its baseline sees them: those it may learn from, and those that it is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from export.processing.images import decode_image
from export.processing.inputs import ImageInput
from finetune.data.datasets import Dataset, open_dataset
from finetune.data.splits import split
from finetune.data.wanted import wanted_of
from finetune.recipe import Recipe
from finetune.task import objective_of
from models.spec import ModelSpec


@dataclass(frozen=True)
class Part:
    """Some items of a data set."""

    dataset: Dataset
    rows: np.ndarray

    @cached_property
    def contents(self) -> list[Any]:
        return [self.dataset.content(int(row)) for row in self.rows]

    @property
    def targets(self) -> np.ndarray:
        """[items, ...], as `finetune.data.targets.Targets.values`."""
        found: np.ndarray = self.dataset.targets[self.rows]
        return found

    def vectors(self) -> np.ndarray:
        """float64 [items, features]: the numbers of a table, or the grey of images of one size."""
        if self.dataset.kind == "images":
            return np.array([pixels(content) for content in self.contents])
        return np.array(self.contents, np.float64)


@dataclass(frozen=True)
class HeldOut:
    """test: what the network has never seen."""

    train: Part
    validation: Part
    test: Part

    @cached_property
    def learned(self) -> Part:
        """What the network has learned from, or chosen its weights by."""
        return Part(self.train.dataset, np.sort(np.concatenate([self.train.rows, self.validation.rows])))


def pixels(content: bytes) -> np.ndarray:
    """float64 [height * width] from 0 to 1."""
    found: np.ndarray = decode_image(content, ImageInput(height=28, width=28, resize="stretch")) / 255.0
    return np.asarray(found.mean(axis=-1).ravel())


def held_out(path: Path, recipe: Recipe) -> HeldOut:
    """The same items that `finetune.run` divides the file into."""
    architecture = recipe.model.architecture if isinstance(recipe.model, ModelSpec) else "mlp"
    wanted = wanted_of(objective_of(recipe.objective, architecture), recipe.data)
    dataset = open_dataset(path, path.name, recipe.data, wanted)
    assert recipe.seed is not None, "a run of the comparison has a seed"
    splits = split(dataset, recipe.data, recipe.seed)
    return HeldOut(*(Part(dataset, rows) for rows in (splits.train, splits.validation, splits.test)))
