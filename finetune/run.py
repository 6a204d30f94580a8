"""One run from data to published bundle: what the worker does for a job and the command line for a recipe."""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch

from export import bundle
from export.bundle import DamagedBundle, Lineage, Manifest
from export.bundling import bundle as publish
from export.parity import ParityError
from export.perplexity import texts_of
from export.quantize import Quantization
from export.storage import StorageError, pull
from finetune import automatic, bagging, ensembles, graph_judge, lora, optim, origin, terms
from finetune.bagging import Member, together
from finetune.batches import evaluation_order
from finetune.data.validation import holds_conversations
from finetune.judging import Judged, judge
from finetune.lesson import Lesson, Trained, curves
from finetune.lesson import train as train_all
from finetune.material import CACHE, Material, gather
from finetune.objectives import choice
from finetune.origin import Origin
from finetune.preprocess import Items, tensors
from finetune.recipe import Adversarial, Hyperparameters, McDropout, Objective, Recipe
from finetune.run_request import Cancelled, JobFailed, Reporter, RunRequest
from finetune.task import contradiction, describe, objective_of, suits, wants_layers
from models import heads, registry
from models.catalog import ARCHITECTURES
from models.mc_dropout import mc_dropout
from models.network import Headed, Network

__all__ = ["Cancelled", "JobFailed", "Reporter", "RunRequest", "run"]

PARITY_BATCH = 32
# Tokens that a quantized language model is judged on.
MOST_JUDGED = 8192
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
        pull(request.repository, request.recipe.begins_with())
        return _run(request, reporter)
    except (ValueError, DamagedBundle, ParityError, StorageError) as error:
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
    plan = plan_of(request)
    material = gather(request, plan.start, bool(plan.joined), plan.section, plan.seed, reporter)
    lesson = lesson_of(request, plan, material, reporter, check)

    reporter.state("running")
    reporter.event(beginning_in_words(plan, material, lesson.chosen))
    trained = train_all(lesson, bagging.members(plan.recipe.ensemble, plan.seed))
    published = [registry.restore(one.folder) for one in plan.joined if one.folder]
    network = together(published or [one.network for one in trained], plan.recipe.ensemble)
    judged = judge(network, trained, lesson, material.test)

    reporter.state("exporting")
    return publish_judged(judged, trained, lesson, material, plan, request)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run begins with and learns. joined: published models that only answer together, and nothing is trained."""

    recipe: Recipe
    seed: int
    start: Origin
    joined: list[Origin]
    section: Objective

    @property
    def base(self) -> str:
        """The names of what it begins with."""
        return ", ".join(one.name for one in self.joined) or self.start.name


def plan_of(request: RunRequest) -> Plan:
    """Raises ValueError when the recipe contradicts itself or what it begins with."""
    recipe = request.recipe
    start = origin.find(recipe.model, request.repository, request.backbones)
    joined = origin.joined(start, recipe, request.repository, request.backbones)
    before = ensembles.objective_before(start.manifest) if joined and start.manifest else None
    given, architecture = recipe.objective or before, start.spec.architecture
    chats = (
        given is None
        and "chat" in ARCHITECTURES[architecture].objectives
        and holds_conversations(request.training.path, request.training.filename, recipe.data)
    )
    section = objective_of(given, architecture, chats=chats)
    if recipe.ensemble and (why := ensembles.contradiction(recipe.ensemble, section, start.spec.architecture)):
        raise ValueError(why)
    if nonsense := contradiction(section, recipe):
        raise ValueError(nonsense[1])
    if unfit := wants_layers(recipe, start.spec.architecture, random=start.beginning == "random"):
        raise ValueError(unfit[1])
    suits(section, start.spec)
    return Plan(recipe=recipe, seed=seed_of(request), start=start, joined=joined, section=section)


def lesson_of(
    request: RunRequest, plan: Plan, material: Material, reporter: Reporter, check: Callable[[], None]
) -> Lesson:
    """How the networks of the run learn from its material. Raises ValueError for what cannot be followed."""
    recipe = plan.recipe
    chosen = automatic.choose(
        recipe,
        material.modality,
        len(material.train),
        beginning=plan.start.beginning,
        adversarial=isinstance(plan.section, Adversarial),
        architecture=plan.start.spec.architecture,
    )
    return Lesson(
        recipe=recipe,
        chosen=chosen,
        objective=choice.build(plan.section, material.dataset.answers, material.train.targets, material.reading),
        terms=[terms.build(term, material.task, material.unlabelled) for term in recipe.terms],
        train=material.splits.train,
        validation=material.splits.validation,
        held_out=material.validation,
        learned=material.learned,
        begin=partial(begin, plan, material, request.backbones),
        knows=plan.start.beginning != "random",
        run=fingerprint(settle(recipe, chosen, plan.seed), request, plan.base),
        folder=request.folder,
        reporter=reporter,
        check=check,
    )


def begin(plan: Plan, material: Material, backbones: Mapping[str, str], training: Items, member: Member) -> Network:
    """The network of a member before its first step, with the statistics of what it learns from."""
    torch.manual_seed(member.seed)
    spec, answers = material.reading.spec, material.dataset.answers
    network = origin.load(plan.start, spec, answers, backbones)
    numbers = np.zeros(0) if training.targets.dtype == object else training.targets  # texts have no scale
    targets = torch.from_numpy(numbers).float()
    if plan.start.folder is None:
        every = 1 + len(training) // MOST_IMAGES if material.modality == "image" else 1
        measured = partial(training.batch, np.arange(0, len(training), every))
        network.measure(lambda: tensors(measured(), torch.device("cpu")), targets)
    elif not origin.keeps_head(plan.start, spec, answers):
        for part in network.modules():
            if isinstance(part, Headed):
                heads.measure(part.head, part.task, targets)
    if isinstance(plan.recipe.ensemble, McDropout):
        row = {name: torch.from_numpy(value) for name, value in training.batch(np.arange(1)).items()}
        network = mc_dropout(network, plan.recipe.ensemble.passes, member.seed, row)
    transfer = plan.recipe.transfer
    if transfer.lora is not None:
        frozen = optim.frozen_blocks(network, transfer.freeze, transfer.train_last)
        lora.adapt(network, transfer.lora, frozen, plan.base)
    return network


def beginning_in_words(plan: Plan, material: Material, chosen: automatic.Chosen) -> str:
    if plan.joined:
        return f"{plan.base} answer as one"
    return (
        f"{plan.base} learns {describe(material.task, material.dataset.answers)} from {len(material.train):,} items "
        f"({len(material.validation):,} for validation, "
        f"{len(material.test):,} for testing): {chosen.epochs} epochs, batch {chosen.batch_size}, learning rate "
        f"{chosen.learning_rate:.2g}, seed {plan.seed}"
    )


def publish_judged(
    judged: Judged, trained: Sequence[Trained], lesson: Lesson, material: Material, plan: Plan, request: RunRequest
) -> Manifest:
    """Raises ParityError or TooMuchLost, and then nothing is published."""

    def tell(stage: str) -> None:
        lesson.check()
        lesson.reporter.event(stage)

    network, reading = judged.network, material.reading
    network.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # which its stub lacks
    network.eval()
    adapters = lora.merge(network)
    held_out = material.test if len(material.test) else material.validation
    shown = tensors(held_out.batch(np.arange(min(SHOWN, len(held_out)))), torch.device("cpu"))
    order = evaluation_order(len(material.validation), PARITY_BATCH)
    settled = settle(plan.recipe, lesson.chosen, plan.seed)
    quantization = None
    if (wanted := plan.recipe.quantization) is not None:
        quantization = Quantization(
            wanted.weights, wanted.most_loss, texts_in(held_out, MOST_JUDGED), texts_in(material.train, MOST_JUDGED)
        )
    optimization = None
    if plan.recipe.optimization is not None:
        optimization = graph_judge.optimization(plan.recipe.optimization, lesson, material, held_out)
    return publish(
        network,
        name=request.name,
        repository=request.repository,
        input=reading.input,
        labels=material.dataset.labels,
        heads=material.dataset.answers.heads,
        intervals=lesson.objective.intervals(),
        tokenizer=reading.tokenizer,
        output_text=reading.written.spec if reading.written else None,
        output_tokenizer=reading.written.tokenizer if reading.written else None,
        generation=reading.generation,
        chat_template=reading.chat_template,
        quantization=quantization,
        optimization=optimization,
        validation=(material.validation.batch(rows) for rows in order),
        metrics={
            **judged.evaluation.figures(),
            **{f"validation_{name}": value for name, value in judged.validated.items()},
            **bagging.mean_metrics([one.result.best_metrics for one in trained]),
        },
        evaluation=judged.evaluation,
        lineage=Lineage(
            base_model=plan.base,
            job_id=request.job_id,
            recipe=msgspec.json.decode(msgspec.json.encode(settled)),
            training_sha256=request.training.sha256,
            validation_sha256=request.validation.sha256 if request.validation else None,
            unlabelled_sha256=sorted(one.sha256 for one in request.unlabelled.values()),
        ),
        extra_files={**curves(trained), **lesson.objective.pictures(network, shown), **adapters},
        progress=tell,
    )


def texts_in(items: Items, most: int) -> list[np.ndarray]:
    """The tokens of some items, `most` in all."""
    batches = (items.batch(rows) for rows in evaluation_order(len(items), PARITY_BATCH))
    return list(texts_of(batches, most))


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


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
