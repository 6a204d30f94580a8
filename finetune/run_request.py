"""What one run is asked to do, and the line back to whoever asked. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from finetune.recipe import Recipe

Stage = Literal["validating", "running", "exporting"]


class FileRef(msgspec.Struct, frozen=True, kw_only=True):
    """A data file on this machine: `filename` is what the user called it, `sha256` in hexadecimal, `id` as uploaded."""

    path: Path
    filename: str
    sha256: str
    id: str


class RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `finetune.run.run`.

    folder: the run's own folder; checkpoints live in it, and a run that finds some goes on from them.
    unlabelled: files of other domains, by what the recipe's terms call them.
    repository: where the bundle is published as `<name>/<next version>`.
    job_id: recorded in the bundle, so that a run repeated after a crash finds what it had already published.
    backbones: names of the operator's own weights → folder or hub id, beside those of `models.catalog.BACKBONES`.
    """

    recipe: Recipe
    training: FileRef
    validation: FileRef | None = None
    unlabelled: dict[str, FileRef] = {}
    folder: Path
    repository: Path
    name: str
    job_id: str | None = None
    backbones: dict[str, str] = {}


class Reporter(Protocol):
    """How a run tells what it does. Calls come from one thread; each should return within milliseconds."""

    def state(self, stage: Stage) -> None:
        """The run enters a stage."""

    def event(
        self, message: str, *, level: str = "info", type: str = "message", data: dict[str, Any] | None = None
    ) -> None:
        """Something a person wants to read; `level` is "info", "warn" or "error"."""

    def metrics(self, step: int, **values: float | None) -> None:
        """Figures after `step` optimizer steps: at most two calls a second, and one at each evaluation."""

    def checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        """A checkpoint is on disk; `metrics` are those of the last evaluation."""

    def cancelled(self) -> bool:
        """Whether to stop. Asked before every step and every batch of other work."""


class Cancelled(Exception):
    """The run stopped because the reporter said so."""


class JobFailed(Exception):
    """The run cannot go on; the message tells the user what is wrong and what to do about it."""
