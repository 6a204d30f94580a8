"""One run from data to published bundle: what the worker does for a job and the command line for a recipe."""

from __future__ import annotations

import hashlib
import shutil
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import msgspec
import numpy as np
import torch

from export import bundle
from export.bundle import DamagedBundle, Lineage, Manifest
from export.bundling import bundle as publish
from export.parity import ParityError
from export.reports.evaluation import Evaluation
from finetune import automatic, bagging, ensembles, origin, preprocess, terms
from finetune.admission import KIND_OF
from finetune.bagging import Member, together
from finetune.batches import evaluation_order
from finetune.data.datasets import Dataset, open_dataset
from finetune.data.items import Kind
from finetune.data.splits import leakage, split
from finetune.data.targets import Targets
from finetune.data.wanted import NOTHING, Wanted, wanted_of
from finetune.evaluate import Measured, evaluate, report
from finetune.lesson import Lesson, curves, train_again
from finetune.lesson import train as train_all
from finetune.objectives import choice
from finetune.preprocess import Items, tensors
from finetune.recipe import Adversarial, Data, Hyperparameters, McDropout, Recipe
from finetune.run_request import Cancelled, FileRef, JobFailed, Reporter, RunRequest
from finetune.smote import oversample
from finetune.task import contradiction, describe, objective_of, suits, task_of
from models import catalog, heads, registry
from models.mc_dropout import mc_dropout
from models.network import Headed, Network
from models.spec import MultiTask

__all__ = ["Cancelled", "JobFailed", "Reporter", "RunRequest", "run"]

PARITY_BATCH = 32
TOLD_SECONDS = 2.0
MOST_PROBLEMS = 20
CACHE = "cache"
# Images that statistics are taken of, and those that are shown.
MOST_IMAGES = 4096
SHOWN = 10


def run(request: RunRequest, reporter: Reporter) -> Manifest:
    """Train as the recipe says and publish the result; the manifest of what is published.

    A run whose folder holds checkpoints goes on from the newest; one that has published already (it was killed right
    after) returns what it published. Raises Cancelled, or JobFailed in words for the user.
    """
    if request.job_id is not None and (done := published_by(request.repository, request.name, request.job_id)):
        return done
    try:
        return _run(request, reporter)
    except (ValueError, DamagedBundle, ParityError) as error:
        raise JobFailed(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        raise JobFailed(
            "the memory of the device is too small: lower batch_size (gradient_accumulation keeps the step as large), "
            "image_size or max_length, or freeze more of the trunk"
        ) from error
    finally:
        shutil.rmtree(request.folder / CACHE, ignore_errors=True)


def _run(request: RunRequest, reporter: Reporter) -> Manifest:
    def check() -> None:
        if reporter.cancelled():
            raise Cancelled

    reporter.state("validating")
    recipe, seed = request.recipe, seed_of(request)
    start = origin.find(recipe.model, request.repository, request.backbones)
    joined = origin.joined(start, recipe, request.repository, request.backbones)
    before = ensembles.objective_before(start.manifest) if joined and start.manifest else None
    section = objective_of(recipe.objective or before, start.spec.architecture)
    if recipe.ensemble and (why := ensembles.contradiction(recipe.ensemble, section, start.spec.architecture)):
        raise ValueError(why)
    if nonsense := contradiction(section, recipe):
        raise ValueError(nonsense[1])
    suits(section, start.spec)
    wanted = wanted_of(section, recipe.data)
    dataset = open_training_data(request, start, wanted)
    modality = modality_of(dataset.kind)
    modalities = catalog.ARCHITECTURES[start.spec.architecture].modalities
    if modality not in modalities:
        learns = " or ".join(KIND_OF[one] for one in modalities)
        raise ValueError(f"{request.training.filename} holds {dataset.kind}; {start.name} learns from {learns}")
    if field := recipe.augmentation.misplaced(modality):
        meant = {"word_dropout": "texts", "smote": "tables"}.get(field, "images")
        raise ValueError(f"augmentation.{field} is for {meant}; {start.name} learns from {KIND_OF[modality]}")
    if recipe.augmentation.smote and wanted.kind != "class":
        raise ValueError("augmentation.smote fills up rare classes; this objective has none")
    task = task_of(section, dataset.answers)
    splits = split(dataset, recipe.data, seed, validation=request.validation is None)
    reading = origin.read(start, recipe, dataset, splits.train, task, request.backbones)
    if joined:
        origin.must_read(start, dataset, reading)
    for problem in dataset.problems[:MOST_PROBLEMS]:
        reporter.event(f"left out {problem.place}: {problem.message}", level="warn", type="problem")
    prepare = partial(
        preprocess.prepare,
        spec=reading.input,
        tokenizer=reading.tokenizer,
        written=reading.written,
        progress=Preparation(reporter),
    )
    items = prepare(dataset, folder=request.folder / CACHE / "training")

    def learned(rows: np.ndarray, member: Member) -> Items:
        drawn, neighbours = items.select(member.drawn(rows)), recipe.augmentation.smote
        return oversample(drawn, neighbours, member.seed) if neighbours else drawn

    train = learned(splits.train, Member(seed=seed))
    validation, test = items.select(splits.validation), items.select(splits.test)
    if request.validation is not None:
        other = open_dataset(
            request.validation.path,
            request.validation.filename,
            recipe.data,
            wanted,
            dataset.answers,
            features=dataset.features,
        )
        report_leakage(dataset, other, reporter)
        validation = prepare(other, folder=request.folder / CACHE / "validation")
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
    chosen = automatic.choose(
        recipe,
        modality,
        len(train),
        beginning=start.beginning,
        adversarial=isinstance(section, Adversarial),
        architecture=start.spec.architecture,
    )
    if isinstance(task, MultiTask):
        for side, words in ((train, "training"), (validation, "validation"), (test, "test")):
            check_heads(task, side, words)
    objective = choice.build(section, dataset.answers, train.targets, reading)
    added = [terms.build(term, task, unlabelled) for term in recipe.terms]

    reporter.state("running")
    base = ", ".join(one.name for one in joined) or start.name
    reporter.event(
        f"{base} answer as one"
        if joined
        else f"{base} learns {describe(task, dataset.answers)} from {len(train):,} items "
        f"({len(validation):,} for validation, "
        f"{len(test):,} for testing): {chosen.epochs} epochs, batch {chosen.batch_size}, learning rate "
        f"{chosen.learning_rate:.2g}, seed {seed}"
    )

    def begin(training: Items, member: Member) -> Network:
        torch.manual_seed(member.seed)
        network = origin.load(start, reading.spec, dataset.answers, request.backbones)
        numbers = np.zeros(0) if training.targets.dtype == object else training.targets  # texts have no scale
        targets = torch.from_numpy(numbers).float()
        if start.folder is None:
            every = 1 + len(training) // MOST_IMAGES if modality == "image" else 1
            measured = partial(training.batch, np.arange(0, len(training), every))
            network.measure(lambda: tensors(measured(), torch.device("cpu")), targets)
        elif not origin.keeps_head(start, reading.spec, dataset.answers):
            for part in network.modules():
                if isinstance(part, Headed):
                    heads.measure(part.head, part.task, targets)
        if isinstance(recipe.ensemble, McDropout):
            row = {name: torch.from_numpy(value) for name, value in training.batch(np.arange(1)).items()}
            network = mc_dropout(network, recipe.ensemble.passes, member.seed, row)
        return network

    settled = settle(recipe, chosen, seed)
    lesson = Lesson(
        recipe=recipe,
        chosen=chosen,
        objective=objective,
        terms=added,
        train=splits.train,
        validation=splits.validation,
        held_out=validation,
        learned=learned,
        begin=begin,
        run=fingerprint(settled, request, base),
        folder=request.folder,
        reporter=reporter,
        check=check,
    )
    trained = train_all(lesson, bagging.members(recipe.ensemble, seed))
    published = [registry.restore(one.folder) for one in joined if one.folder]
    network = together(published or [one.network for one in trained], recipe.ensemble)

    def answered(items: Items) -> Measured:
        return evaluate(network, items, objective, 2 * chosen.batch_size, check)

    on_validation = cache(lambda: answered(validation))  # it is asked for twice, before anything is learned again

    def measure(items: Items, words: str) -> Evaluation:
        found = report(on_validation() if items is validation else answered(items), items, objective)
        found = objective.examined(network, items, found, check)
        figures = found.figures()
        shown = ", ".join(f"{name.replace('_', ' ')} {figures[name]:.4f}" for name in objective.metrics or figures)
        reporter.event(f"{shown} on {found.samples:,} {words}", type="evaluation", data=figures)
        return found

    def calibrate() -> None:
        objective.calibrate(on_validation().kept, validation.targets)
        if not objective.intervals():
            reporter.event(
                f"{len(validation):,} validation items are too few to tell in which interval 95 in 100 numbers lie",
                level="warn",
            )

    # Intervals hold for the weights that are published, and how well they do is seen on items they were not taken from.
    keeps = recipe.stopping is None or recipe.stopping.retrain == "keep"
    calibrates = objective.calibrates and keeps
    if calibrates and len(test):
        calibrate()
    held_out, which = (test, "test") if len(test) else (validation, "validation")
    only = trained[0].result if len(trained) == 1 else None
    found = measure(held_out, f"{which} items" + (f", with the weights of step {only.best_step:,}" if only else ""))
    if calibrates and not len(test):
        calibrate()
    together_on = measure(validation, "validation items") if len(test) and not only else found
    validated = only.best_metrics if only else together_on.figures()
    if trained and not keeps:
        network = together(train_again(lesson, trained), recipe.ensemble)
        if len(test):
            found = measure(test, "test items, after learning from the validation split, too")
        else:
            reporter.event("the figures stay those from before: what they were measured on has been learned from now")

    reporter.state("exporting")

    def tell(stage: str) -> None:
        check()
        reporter.event(stage)

    network.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # which its stub lacks
    network.eval()
    shown = tensors(held_out.batch(np.arange(min(SHOWN, len(held_out)))), torch.device("cpu"))
    return publish(
        network,
        name=request.name,
        repository=request.repository,
        input=reading.input,
        labels=dataset.labels,
        heads=dataset.answers.heads,
        intervals=objective.intervals(),
        tokenizer=reading.tokenizer,
        output_text=reading.written.spec if reading.written else None,
        output_tokenizer=reading.written.tokenizer if reading.written else None,
        generation=reading.generation,
        chat_template=reading.chat_template,
        validation=(validation.batch(rows) for rows in evaluation_order(len(validation), PARITY_BATCH)),
        metrics={
            **found.figures(),
            **{f"validation_{name}": value for name, value in validated.items()},
            **bagging.mean_metrics([one.result.best_metrics for one in trained]),
        },
        evaluation=found,
        lineage=Lineage(
            base_model=base,
            job_id=request.job_id,
            recipe=msgspec.json.decode(msgspec.json.encode(settled)),
            training_sha256=request.training.sha256,
            validation_sha256=request.validation.sha256 if request.validation else None,
            unlabelled_sha256=sorted(one.sha256 for one in request.unlabelled.values()),
        ),
        extra_files={**curves(trained), **objective.pictures(network, shown)},
        progress=tell,
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


def published_by(repository: Path, name: str, job_id: str) -> Manifest | None:
    """The bundle that this job has published under `name`, if it has."""
    for version in reversed(bundle.versions(repository, name)):
        with suppress(DamagedBundle):
            manifest = bundle.read_manifest(repository / name / str(version))
            if manifest.lineage.job_id == job_id:
                return manifest
    return None


def seed_of(request: RunRequest) -> int:
    """The recipe's seed, else one that follows from the job: a job that is taken up again must have the same."""
    if request.recipe.seed is not None:
        return request.recipe.seed
    return zlib.crc32((request.job_id or "").encode()) % 2**31


def settle(recipe: Recipe, chosen: automatic.Chosen, seed: int) -> Recipe:
    """The recipe with its seed and numbers in the place of "auto": what to run again for the same result."""
    numbers = Hyperparameters(n_epochs=chosen.epochs, batch_size=chosen.batch_size, learning_rate=chosen.learning_rate)
    optimizer = chosen.optimizer if recipe.optimizer == "auto" else recipe.optimizer
    return msgspec.structs.replace(recipe, seed=seed, method=None, hyperparameters=numbers, optimizer=optimizer)


def fingerprint(settled: Recipe, request: RunRequest, start: str) -> str:
    """What a checkpoint must agree in to be gone on from: recipe, data and the weights at the start."""
    files = [request.training.sha256, request.validation.sha256 if request.validation else None]
    files += [one.sha256 for one in request.unlabelled.values()]
    return hashlib.sha256(msgspec.json.encode([settled, files, start])).hexdigest()


def open_training_data(request: RunRequest, start: origin.Origin, wanted: Wanted) -> Dataset:
    """The training data; with the same classes as the published model it starts from, in that model's order."""
    dataset = open_dataset(request.training.path, request.training.filename, request.recipe.data, wanted)
    before = start.manifest.labels if start.manifest else []
    if wanted.kind != "class" or sorted(before) != sorted(dataset.labels):
        return dataset
    number = np.array([before.index(label) for label in dataset.labels], np.int64)
    classes = number[dataset.targets]
    return replace(dataset, answers=Targets(before, classes, classes))


def open_unlabelled(one: FileRef, data: Data, training: Dataset) -> Dataset:
    """Items of another domain, without their labels. Raises ValueError when they are not like those of the training
    file."""
    found = open_dataset(one.path, one.filename, data, NOTHING, features=training.features)
    if found.kind != training.kind:
        raise ValueError(f"terms: {one.filename} holds {found.kind}, the training file {training.kind}")
    return found


def check_heads(task: MultiTask, items: Items, words: str) -> None:
    """Raises ValueError naming a head that none of the items has a label for."""
    for name, part in heads.split_targets(task.heads, torch.from_numpy(items.targets)).items():
        if len(part) and part.isnan().all():
            raise ValueError(
                f"head {name!r}: none of the {len(part):,} {words} items has a label for it; give more data, or a "
                "validation file"
            )


def modality_of(kind: Kind) -> catalog.Modality:
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


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
