"""One training of the comparison: what it needs, how it is done, what is kept of it.

A run goes the public way: a recipe and a data file through `finetune.run` to a published bundle. What is kept says
what it was made from; a run whose code, recipe and data have not changed is not done again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.architectures import counting, data
from benchmarks.architectures.held_out import held_out
from export.bundle import read_manifest, sha256_of
from export.processing.inputs import SeriesInput, TextInput
from finetune.preprocess import prepare
from finetune.recipe import Recipe
from finetune.run import run as train
from finetune.run_request import FileRef, RunRequest, Stage
from models import registry

ROOT = Path(__file__).parents[2]
# What a trained network follows from.
SOURCES = ("models", "finetune", "export")
# A bundle's curve, as `finetune.checkpoint.Progress` describes it.
CURVE = "training_curve.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """name: it is published under. file: one of `data.FILES`. recipe: without name and training file. needs: runs that
    must have been published before."""

    name: str
    file: str
    recipe: Recipe
    needs: tuple[str, ...] = ()


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a run.

    key: of what it was made from. version: of the bundle, in the repository. seconds: from the first step to the
    evaluation on the test items. multiply_adds: of each graph, for one item of `length` steps or tokens (0 where an
    item has none), the median of the test items. difference: the largest between PyTorch and ONNX Runtime.
    """

    name: str
    key: str
    version: int
    task: str
    parameters: int
    multiply_adds: dict[str, int]
    length: int
    seconds: float
    metrics: dict[str, float]
    difference: float
    tolerance: float

    def bundle(self, folder: Path) -> Path:
        """In the folder of the comparison."""
        return repository(folder) / self.name / str(self.version)


def repository(folder: Path) -> Path:
    return folder / "repository"


def files(folder: Path) -> Path:
    return folder / "data"


class Watch:
    """A reporter that keeps the time of each stage, and passes the figures on: (stage, step, steps, words)."""

    def __init__(self, tell: Callable[[str, int, int, str], None]) -> None:
        self.tell = tell
        self.began: dict[str, float] = {}

    def state(self, stage: Stage) -> None:
        self.began[stage] = time.monotonic()
        self.tell(stage, 0, 0, "")

    def event(
        self, message: str, *, level: str = "info", type: str = "message", data: dict[str, Any] | None = None
    ) -> None:
        """What is told in words is in the bundle, too."""

    def metrics(self, step: int, **values: float | None) -> None:
        loss = values.get("train_loss")
        self.tell("running", step, int(values.get("total_steps") or 0), "" if loss is None else f"loss {loss:.4g}")

    def checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        """Nothing to tell."""

    def cancelled(self) -> bool:
        return False


def do(one: Run, folder: Path, tell: Callable[[str, int, int, str], None] = lambda *_: None) -> Trained:
    """Train, publish and count, or take what is there. Raises data.Missing, and JobFailed as `finetune.run` does."""
    path = data.prepared(one.file, files(folder))
    made_from = key(one, folder)
    if (kept := read(one.name, folder)) is not None and kept.key == made_from:
        return kept
    recipe = msgspec.structs.replace(one.recipe, name=one.name, training_file=one.file)
    watch = Watch(tell)
    manifest = train(
        RunRequest(
            recipe=recipe,
            training=FileRef(path=path, filename=path.name, sha256=sha256_of(path).sha256, id=one.file),
            folder=folder / "runs" / made_from[:16],
            repository=repository(folder),
            name=one.name,
            job_id=made_from,
        ),
        watch,
    )
    published = repository(folder) / one.name / str(manifest.version)
    length = usual_length(path, recipe, published)
    found = Trained(
        name=one.name,
        key=made_from,
        version=manifest.version,
        task=manifest.task,
        parameters=sum(parameter.numel() for parameter in registry.restore(published).parameters()),
        multiply_adds=counting.multiply_adds(published, manifest, length),
        length=length,
        # A run that was killed right after it had published has no times; what it measured is in the bundle.
        seconds=watch.began["exporting"] - watch.began["running"] if "exporting" in watch.began else 0.0,
        metrics=manifest.metrics,
        difference=manifest.parity.largest_difference,
        tolerance=manifest.parity.tolerance,
    )
    place(one.name, folder).parent.mkdir(parents=True, exist_ok=True)
    place(one.name, folder).write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    return found


def usual_length(path: Path, recipe: Recipe, published: Path) -> int:
    """Median steps or tokens of the test items as the network reads them, 0 where they have no length."""
    manifest = read_manifest(published)
    if not isinstance(manifest.input, TextInput | SeriesInput):
        return 0
    test = held_out(path, recipe).test
    tokenizer = (published / manifest.input.tokenizer).read_bytes() if isinstance(manifest.input, TextInput) else None
    items = prepare(test.dataset, manifest.input, tokenizer, published, lambda *_: None).select(test.rows)
    assert items.lengths is not None
    return int(np.median(items.lengths))


def place(name: str, folder: Path) -> Path:
    return folder / "trained" / f"{name}.json"


def read(name: str, folder: Path) -> Trained | None:
    """What was kept of a run before; None when there is nothing, or nothing that can be read."""
    try:
        return msgspec.json.decode(place(name, folder).read_bytes(), type=Trained)
    except (OSError, msgspec.DecodeError):
        return None


def key(one: Run, folder: Path) -> str:
    """SHA-256 of what a run is made from: recipe, data, the runs before it, and the code."""
    before = [kept.key for name in one.needs if (kept := read(name, folder)) is not None]
    made_from = [one.recipe, one.name, sha256_of(data.prepared(one.file, files(folder))).sha256, before, sources()]
    return hashlib.sha256(msgspec.json.encode(made_from)).hexdigest()


@cache
def sources() -> str:
    digest = hashlib.sha256()
    for room in SOURCES:
        for path in sorted((ROOT / room).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()
