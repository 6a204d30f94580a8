"""`espalier finetune RECIPE.yaml` and `espalier export MODEL`: the same run as a job's, in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from export.bundle import DamagedBundle, sha256_of
from export.parity import ParityError
from export.untouched import export_backbone
from finetune.recipe import Recipe
from finetune.recipe_file import RecipeError, read_recipe
from finetune.run import run
from finetune.run_request import Cancelled, FileRef, JobFailed, RunRequest, Stage
from models.spec import ModelSpec

# What Ctrl-C ends with, as shells have it.
INTERRUPTED = 130


class TerminalReporter:
    """Shows a run in a terminal: a bar with the newest figures, and a line for each event."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.bar: TaskID = progress.add_task("starting", total=None, figures="")

    def state(self, stage: Stage) -> None:
        self.progress.update(self.bar, description=stage)

    def event(
        self, message: str, *, level: str = "info", type: str = "message", data: dict[str, Any] | None = None
    ) -> None:
        style = {"warn": "yellow", "error": "red"}.get(level, "dim")
        self.progress.console.print(message, style=style, markup=False, highlight=False)

    def metrics(self, step: int, **values: float | None) -> None:
        measured = [name for name in values if name.startswith("validation_")]
        shown = ("train_loss", *measured[:2], "samples_per_second")
        figures = "  ".join(f"{name} {value:.4g}" for name in shown if (value := values.get(name)) is not None)
        self.progress.update(self.bar, completed=step, total=values.get("total_steps"), figures=figures)

    def checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        """Nothing to show: the folder says it."""

    def cancelled(self) -> bool:
        return False


def finetune(recipe_path: Path, *, home: Path, repository: Path, backbones: Mapping[str, str]) -> int:
    """Run a recipe; its files are paths relative to it. The same command goes on after Ctrl-C. Returns the status."""
    console = Console()
    try:
        recipe = read_recipe(recipe_path)
        training = local_file(recipe_path, recipe.training_file, "training_file")
        validation = None
        if recipe.validation_file is not None:
            validation = local_file(recipe_path, recipe.validation_file, "validation_file")
        unlabelled = {name: local_file(recipe_path, name, "terms") for name in recipe.unlabelled_files()}
    except RecipeError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    # The same recipe on the same data finds its checkpoints again.
    digests = [training.sha256, validation.sha256 if validation else None, *(f.sha256 for f in unlabelled.values())]
    identity = hashlib.sha256(msgspec.json.encode([recipe, *digests])).hexdigest()[:16]
    request = RunRequest(
        recipe=recipe,
        training=training,
        validation=validation,
        unlabelled=unlabelled,
        folder=home / "runs" / identity,
        repository=repository,
        name=published_name(recipe),
        backbones=dict(backbones),
    )
    request.folder.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        TextColumn("[dim]{task.fields[figures]}"),
    )
    try:
        with Progress(*columns, console=console) as progress:
            manifest = run(request, TerminalReporter(progress))
    except (JobFailed, Cancelled) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from the last checkpoint")
        return INTERRUPTED
    console.print(f"[green]{manifest.name}[/] version {manifest.version} is in {repository / manifest.name}")
    return 0


def export(model: str, *, name: str | None, repository: Path, backbones: Mapping[str, str]) -> int:
    """Publish a backbone as it is. Returns the exit status."""
    console = Console()
    try:
        with console.status("loading") as status:
            manifest = export_backbone(
                model, name=name, repository=repository, backbones=backbones, progress=status.update
            )
    except (ValueError, DamagedBundle, ParityError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    console.print(f"[green]{manifest.name}[/] version {manifest.version} is in {repository / manifest.name}")
    return 0


def local_file(recipe_path: Path, given: str, field: str) -> FileRef:
    """Raises RecipeError when there is no such file."""
    path = (recipe_path.parent / given).resolve()
    if not path.is_file():
        raise RecipeError(f"{recipe_path}: {field}: there is no file {path}")
    return FileRef(path=path, filename=path.name, sha256=sha256_of(path).sha256, id=given)


def published_name(recipe: Recipe) -> str:
    model = recipe.model.architecture if isinstance(recipe.model, ModelSpec) else Path(recipe.model).name.split(":")[0]
    return recipe.name or (f"{model}-{recipe.suffix}" if recipe.suffix else model)
