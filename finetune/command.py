"""`espalier finetune RECIPE.yaml` and `espalier export MODEL`: the same run as a job's, in this process."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from export.bundle import DamagedBundle, sha256_of
from export.parity import ParityError
from export.processing.chat import Message, render
from export.processing.inputs import BadInput
from export.untouched import Weights, export_backbone
from finetune.recipe import Recipe
from finetune.recipe_file import RecipeError, read_recipe
from finetune.run import run
from finetune.run_request import Cancelled, FileRef, JobFailed, RunRequest, Stage
from models.backbones.language import Language
from models.spec import ModelSpec

# What Ctrl-C ends with, as shells have it.
INTERRUPTED = 130


class TerminalReporter:
    """Shows a run in a terminal: a bar with the newest figures, and a line for each event."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.bar: TaskID = progress.add_task("starting", total=None, figures="")
        self.interrupted = False

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
        return self.interrupted


@contextmanager
def interruptible(reporter: TerminalReporter) -> Iterator[None]:
    """The first Ctrl-C ends the run between two steps, the second at once. As an exception that comes anywhere it would
    be lost where it falls into a callback of C code."""

    def stop(number: int, frame: object) -> None:
        reporter.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
            reporter = TerminalReporter(progress)
            with interruptible(reporter):
                manifest = run(request, reporter)
    except JobFailed as error:
        console.print(str(error), style="red", markup=False)
        return 1
    except (Cancelled, KeyboardInterrupt):
        console.print("interrupted; the same command goes on from the last checkpoint")
        return INTERRUPTED
    console.print(f"[green]{manifest.name}[/] version {manifest.version} is in {repository / manifest.name}")
    return 0


def export(
    model: str,
    *,
    name: str | None,
    weights: Weights,
    held_out: Path | None,
    most_loss: float,
    repository: Path,
    backbones: Mapping[str, str],
) -> int:
    """Publish a backbone as it is. Returns the exit status."""
    console = Console()
    try:
        with console.status("loading") as status:
            manifest = export_backbone(
                model,
                name=name,
                repository=repository,
                backbones=backbones,
                kept_as=weights,
                most_loss=most_loss,
                held_out=partial(held_out_texts, held_out) if held_out else None,
                progress=status.update,
            )
    except (ValueError, DamagedBundle, ParityError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    console.print(f"[green]{manifest.name}[/] version {manifest.version} is in {repository / manifest.name}")
    return 0


def held_out_texts(path: Path, language: Language) -> list[str]:
    """Of a file: a text a line, or of one that ends with .jsonl objects with `text`, or with `messages`, which the chat
    template is for. Raises ValueError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(line if path.suffix != ".jsonl" else _held_out_text(line, language))
        except (msgspec.DecodeError, BadInput) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no text")
    return found


class HeldOut(msgspec.Struct):
    """A line of a JSONL file."""

    text: str | None = None
    messages: list[Message] | None = None


def _held_out_text(line: str, language: Language) -> str:
    one = msgspec.json.decode(line, type=HeldOut)
    if one.text is not None:
        return one.text
    if one.messages is None:
        raise BadInput("has neither `text` nor `messages`")
    if language.chat_template is None:
        raise BadInput("`messages`: the model has no chat template")
    tokenizer = Tokenizer.from_str(language.tokenizer.decode())
    end = str(tokenizer.id_to_token(language.ends[0]))
    # The tokenizer puts the beginning before every text, once.
    return render(language.chat_template, one.messages, generate=False, bos="", eos=end)


def local_file(recipe_path: Path, given: str, field: str) -> FileRef:
    """Raises RecipeError when there is no such file."""
    path = (recipe_path.parent / given).resolve()
    if not path.is_file():
        raise RecipeError(f"{recipe_path}: {field}: there is no file {path}")
    return FileRef(path=path, filename=path.name, sha256=sha256_of(path).sha256, id=given)


def published_name(recipe: Recipe) -> str:
    model = recipe.model.architecture if isinstance(recipe.model, ModelSpec) else Path(recipe.model).name.split(":")[0]
    return recipe.name or (f"{model}-{recipe.suffix}" if recipe.suffix else model)
