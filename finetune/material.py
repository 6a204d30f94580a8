"""What a run learns from and is measured on: its files, split, and prepared as its network reads them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from finetune import origin, preprocess
from finetune.admission import KIND_OF
from finetune.bagging import Member
from finetune.chat_tokens import CHATML
from finetune.data.datasets import Dataset, open_dataset
from finetune.data.items import Kind
from finetune.data.splits import Splits, leakage, split
from finetune.data.targets import Targets
from finetune.data.wanted import NOTHING, Wanted, wanted_of
from finetune.origin import Origin, Reading
from finetune.preprocess import Items
from finetune.recipe import Data, Objective
from finetune.run_request import Cancelled, FileRef, Reporter, RunRequest
from finetune.smote import oversample
from finetune.task import task_of
from models import catalog, heads
from models.catalog import Modality
from models.spec import MultiTask, Task

TOLD_SECONDS = 2.0
MOST_PROBLEMS = 20
CACHE = "cache"


@dataclass(frozen=True, kw_only=True)
class Material:
    """dataset: the training file. splits: its rows. learned: the items of some rows that a member learns from; `train`
    is what one does that draws none. unlabelled: items of other domains, by what the recipe's terms call them."""

    dataset: Dataset
    modality: Modality
    task: Task
    reading: Reading
    splits: Splits
    learned: Callable[[np.ndarray, Member], Items]
    train: Items
    validation: Items
    test: Items
    unlabelled: dict[str, Items]


def gather(request: RunRequest, start: Origin, joined: bool, section: Objective, seed: int, tell: Reporter) -> Material:
    """Read and prepare all files of a run that begins with `start` and learns by `section`.

    joined: nothing is trained, and the data must be what `start` answers. Raises ValueError when the data do not do.
    """
    recipe = request.recipe
    wanted = wanted_of(section, recipe.data)
    dataset = open_training_data(request, start, wanted)
    modality = modality_of(dataset.kind)
    must_suit(request, start, dataset, modality, wanted)
    task = task_of(section, dataset.answers)
    splits = split(dataset, recipe.data, seed, validation=request.validation is None)
    reading = origin.read(start, recipe, dataset, splits.train, task, request.backbones)
    if joined:
        origin.must_read(start, dataset, reading)
    for problem in dataset.problems[:MOST_PROBLEMS]:
        tell.event(f"left out {problem.place}: {problem.message}", level="warn", type="problem")
    prepare = partial(
        preprocess.prepare,
        spec=reading.input,
        tokenizer=reading.tokenizer,
        written=reading.written,
        chat_template=reading.chat_template,
        end_token_ids=reading.generation.end_token_ids if reading.generation else (),
        progress=Preparation(tell),
    )
    items = prepare(dataset, folder=request.folder / CACHE / "training")
    remark(tell, request.training, items)
    if wanted.kind == "chat" and reading.chat_template == CHATML:
        tell.event("chats are written as ChatML, as those of models without a template of their own")
    learned = partial(learn_from, items, recipe.augmentation.smote)
    validation = items.select(splits.validation)
    if request.validation is not None:
        validation = prepare(
            open_validation_data(request.validation, recipe.data, wanted, dataset, tell),
            folder=request.folder / CACHE / "validation",
        )
        remark(tell, request.validation, validation)
    if not len(validation):
        none = "no class has two different items" if wanted.kind == "class" else "there are no two different items"
        raise ValueError(
            f"{request.training.filename}: {none}, so none can be held out for validation; "
            "give more data, or a validation file"
        )
    unlabelled = {
        name: prepare(open_unlabelled(one, recipe.data, dataset), folder=request.folder / CACHE / one.sha256)
        for name, one in request.unlabelled.items()
    }
    material = Material(
        dataset=dataset,
        modality=modality,
        task=task,
        reading=reading,
        splits=splits,
        learned=learned,
        train=learned(splits.train, Member(seed=seed)),
        validation=validation,
        test=items.select(splits.test),
        unlabelled=unlabelled,
    )
    must_have_labels(material)
    return material


def remark(tell: Reporter, file: FileRef, items: Items) -> None:
    """Say what was cut and what was left out when the items of a file were prepared."""
    for one in items.remarks:
        tell.event(f"{file.filename}: {one}", level="warn", type="problem")


def learn_from(items: Items, neighbours: int, rows: np.ndarray, member: Member) -> Items:
    """What a member learns from of some rows; with `neighbours`, rare classes are filled up."""
    drawn = items.select(member.drawn(rows))
    return oversample(drawn, neighbours, member.seed) if neighbours else drawn


def must_suit(request: RunRequest, start: Origin, dataset: Dataset, modality: Modality, wanted: Wanted) -> None:
    """Raises ValueError when the network cannot read data of this kind, or an augmentation is for data of another."""
    modalities = catalog.ARCHITECTURES[start.spec.architecture].modalities
    if modality not in modalities:
        learns = " or ".join(KIND_OF[one] for one in modalities)
        raise ValueError(f"{request.training.filename} holds {dataset.kind}; {start.name} learns from {learns}")
    augmentation = request.recipe.augmentation
    if field := augmentation.misplaced(modality):
        meant = {"word_dropout": "texts", "smote": "tables"}.get(field, "images")
        raise ValueError(f"augmentation.{field} is for {meant}; {start.name} learns from {KIND_OF[modality]}")
    if augmentation.smote and wanted.kind != "class":
        raise ValueError("augmentation.smote fills up rare classes; this objective has none")


def must_have_labels(material: Material) -> None:
    """Raises ValueError naming a head that none of the items of a split has a label for."""
    if not isinstance(material.task, MultiTask):
        return
    sides = ((material.train, "training"), (material.validation, "validation"), (material.test, "test"))
    for items, words in sides:
        for name, part in heads.split_targets(material.task.heads, torch.from_numpy(items.targets)).items():
            if len(part) and part.isnan().all():
                raise ValueError(
                    f"head {name!r}: none of the {len(part):,} {words} items has a label for it; give more data, or a "
                    "validation file"
                )


class Preparation:
    """Tells the reporter how far the data are prepared, every few seconds, and stops when the run is cancelled."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.told = time.monotonic()

    def __call__(self, done: int, items: int) -> None:
        if self.reporter.cancelled():
            raise Cancelled
        if time.monotonic() - self.told >= TOLD_SECONDS:
            self.reporter.event(
                f"prepared {done:,} of {items:,} items", type="preparation", data={"done": done, "items": items}
            )
            self.told = time.monotonic()


def open_training_data(request: RunRequest, start: Origin, wanted: Wanted) -> Dataset:
    """The training data; with the same classes as the published model it starts from, in that model's order."""
    dataset = open_dataset(request.training.path, request.training.filename, request.recipe.data, wanted)
    before = start.manifest.labels if start.manifest else []
    if wanted.kind != "class" or sorted(before) != sorted(dataset.labels):
        return dataset
    number = np.array([before.index(label) for label in dataset.labels], np.int64)
    classes = number[dataset.targets]
    return replace(dataset, answers=Targets(before, classes, classes))


def open_validation_data(one: FileRef, data: Data, wanted: Wanted, training: Dataset, reporter: Reporter) -> Dataset:
    """A validation file's, with the labels of the training file; items that are in both are told of."""
    found = open_dataset(one.path, one.filename, data, wanted, training.answers, features=training.features)
    report_leakage(training, found, reporter)
    return found


def open_unlabelled(one: FileRef, data: Data, training: Dataset) -> Dataset:
    """Items of another domain, without their labels. Raises ValueError when they are not like those of the training
    file."""
    found = open_dataset(one.path, one.filename, data, NOTHING, features=training.features)
    if found.kind != training.kind:
        raise ValueError(f"terms: {one.filename} holds {found.kind}, the training file {training.kind}")
    return found


def modality_of(kind: Kind) -> Modality:
    """Of the architectures that read a kind of data."""
    return next(modality for modality, one in KIND_OF.items() if one == kind)


def report_leakage(training: Dataset, validation: Dataset, reporter: Reporter) -> None:
    """Say how many validation items are in the training data, too: the metrics would flatter."""
    shared = leakage(training, validation)
    if shared:
        reporter.event(
            f"{len(shared):,} of {len(validation):,} validation items are in the training file, too: the validation "
            f"metrics will be too good. The first: {shared[0][1]} is {shared[0][0]} of the training file",
            level="warn",
            type="leakage",
        )
