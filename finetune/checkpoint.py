"""Checkpoints of a run: what a process that takes over needs to go on as if nothing had happened.

    <folder>/step-00000120/   weights.safetensors  optimizer.safetensors  state.json
    <folder>/best-00000100.safetensors

What never learns is not in it: a run begins with it again, and its digest is in the run's fingerprint.
A checkpoint is written under a temporary name, flushed to the disk and renamed, so it is whole or absent. state.json
holds the SHA-256 of every file; a checkpoint that differs is given up for the one before. Nothing is pickled. There
is no random state: the random numbers of a step follow from the seed and the step's number.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.bundle import FileDigest, sha256_of

KEPT = 2
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


class GradientNorms(msgspec.Struct, frozen=True):
    """Euclidean norm of each block's gradient, from the input to the head, after `step` steps."""

    step: int
    norms: dict[str, float]


class Progress(msgspec.Struct, kw_only=True):
    """Where a run stands, beside its tensors.

    run: fingerprint of recipe, data and the weights that never learn; a checkpoint of another run is not taken up.
    step: optimizer steps done; epoch and position in it follow from it.
    best, best_step, best_metrics: the best evaluation so far, by the metric that chooses what is published.
    reference, stale: the value that early stopping wants improved, and the evaluations for which it was not.
    flat_loss, flat, plateaus: lowest validation loss, evaluations since, and how often the rate has fallen for it.
    loss_sum, weight_sum: training loss since the last point of `curve`.
    curve: step, epoch, train_loss, learning_rate at regular steps. evaluations: step, epoch and validation metrics.
    gradient_norms: at the regular steps of the curve.
    scaler: state of the loss scaling of float16.
    """

    run: str
    step: int = 0
    best: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float] = {}
    reference: float | None = None
    stale: int = 0
    stopped: bool = False
    flat_loss: float | None = None
    flat: int = 0
    plateaus: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    curve: list[dict[str, float]] = []
    evaluations: list[dict[str, float]] = []
    gradient_norms: list[GradientNorms] = []
    scaler: dict[str, float] = {}


class _State(msgspec.Struct, kw_only=True):
    progress: Progress
    files: dict[str, FileDigest]


@dataclass(frozen=True)
class Checkpoint:
    """`best` holds the weights of the best evaluation, empty before the first."""

    progress: Progress
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, in hexadecimal."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, then remove all but the last two. Returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.progress.step:08d}"
    staging = folder / f".{uuid4().hex}"
    staging.mkdir()
    files: dict[str, FileDigest] = {}
    if checkpoint.best:
        best = _best_file(folder, checkpoint.progress)
        if not best.exists():
            _write_tensors(staging / best.name, checkpoint.best)
            os.rename(staging / best.name, best)
        files[best.name] = sha256_of(best)
    for name, tensors in ((WEIGHTS, checkpoint.weights), (OPTIMIZER, checkpoint.optimizer)):
        _write_tensors(staging / name, tensors)
        files[name] = sha256_of(staging / name)
    (staging / STATE).write_bytes(msgspec.json.encode(_State(progress=checkpoint.progress, files=files)))
    _flush(staging / STATE)
    _flush(staging)
    os.rename(staging, final)
    _flush(folder)
    _prune(folder)
    return final


def load(folder: Path, run: str, unusable: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of `run`, on the CPU; None when there is none.

    Newer ones that cannot be used are removed, and `unusable` is told why.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            state = msgspec.json.decode((path / STATE).read_bytes(), type=_State)
            if state.progress.run != run:
                raise ValueError("it belongs to a run with another recipe or other data, or from other weights")
            best = _best_file(folder, state.progress)
            for name, expected in state.files.items():
                place = best if name == best.name else path / name
                if not place.is_file() or sha256_of(place) != expected:
                    place.unlink(missing_ok=True)
                    raise ValueError(f"{name} is damaged")
        except (OSError, ValueError, msgspec.DecodeError) as error:
            unusable(f"checkpoint {path.name} cannot be used: {error}")
            shutil.rmtree(path)
            continue
        weights, optimizer = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
        return Checkpoint(state.progress, weights, optimizer, load_file(best) if best.name in state.files else {})
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step-*"))


def _best_file(folder: Path, progress: Progress) -> Path:
    return folder / f"best-{progress.best_step:08d}.safetensors"


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    _flush(path)


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path) -> None:
    """Remove all but the last two checkpoints, the best weights that neither of them names, and dead staging."""
    kept = _checkpoints(folder)[-KEPT:]
    for path in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(path)
    for path in folder.glob(".*"):
        shutil.rmtree(path)
    named = {name for path in kept for name in msgspec.json.decode((path / STATE).read_bytes(), type=_State).files}
    for path in folder.glob("best-*.safetensors"):
        if path.name not in named:
            path.unlink()
