"""A claim of the course: the runs that it is measured on, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.architectures.pictures import Picture
from benchmarks.architectures.runs import CURVE, Run, Trained
from finetune.checkpoint import GradientNorms


@dataclass(frozen=True)
class Section:
    """title: the claim. holds: whether it came out so. text: Markdown of what was measured."""

    title: str
    holds: bool
    text: str
    pictures: tuple[Picture, ...] = ()


class Curve(msgspec.Struct, frozen=True):
    """As in the bundle's training_curve.json."""

    curve: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    gradient_norms: list[GradientNorms]


@dataclass(frozen=True)
class Finished:
    """The runs that are done, and the folder of the comparison."""

    trained: Mapping[str, Trained]
    folder: Path

    def bundle(self, name: str) -> Path:
        return self.trained[name].bundle(self.folder)

    def curve(self, name: str) -> Curve:
        return msgspec.json.decode((self.bundle(name) / CURVE).read_bytes(), type=Curve)

    def checkpoint(self, name: str) -> Path:
        """Weights of a run's last step, which need not be the published ones."""
        one = self.trained[name]
        steps = sorted((self.folder / "runs" / one.key[:16] / "checkpoints").glob("step-*"))
        return steps[-1] / "weights.safetensors"


@dataclass(frozen=True)
class Claim:
    """runs: what `measure` needs to be done."""

    name: str
    measure: Callable[[Finished], Section]
    runs: tuple[Run, ...] = ()
