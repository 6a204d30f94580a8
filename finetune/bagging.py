"""Bagging: several networks, each from another seed and a draw of its own of the data (Breiman 1996)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.recipe import Bagging, Ensemble, Joined
from finetune.run_request import Reporter, Stage
from models.ensemble import ensemble
from models.network import Network


@dataclass(frozen=True, kw_only=True)
class Member:
    """One network of a run. number: from 1; `members` is 1 without bagging. bootstrap: it learns from a draw."""

    seed: int
    number: int = 1
    members: int = 1
    bootstrap: bool = False

    @property
    def name(self) -> str:
        """Of its folder, and before the names of its files; "" when it is the only member."""
        return f"member-{self.number:02d}" if self.members > 1 else ""

    def drawn(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` int64 [items] that it learns from: a draw of as many with replacement, or all."""
        if not self.bootstrap:
            return rows
        return np.random.default_rng(self.seed).choice(rows, len(rows))


def members(section: Ensemble | None, seed: int) -> list[Member]:
    """The networks that a run trains; the seed of each of several follows from the run's and its number."""
    if isinstance(section, Joined):
        return []
    if not isinstance(section, Bagging):
        return [Member(seed=seed)]
    seeds = np.random.SeedSequence(seed).generate_state(section.members) >> 1
    return [
        Member(seed=int(one), number=i, members=section.members, bootstrap=section.bootstrap)
        for i, one in enumerate(seeds, 1)
    ]


def together(networks: Sequence[Network], section: Ensemble | None) -> Network:
    """What is published of the networks of a run."""
    return ensemble(networks, section.vote) if isinstance(section, Bagging | Joined) else networks[0]


def mean_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several members, what each reaches on its own on the validation split, on average: "members_accuracy", ..."""
    if len(metrics) < 2:
        return {}
    return {f"members_{name}": float(np.mean([one[name] for one in metrics])) for name in metrics[0]}


class MemberReporter:
    """Tells of one member's training as a part of the whole run: its steps come behind those of the members before."""

    def __init__(self, reporter: Reporter, member: Member, before: int) -> None:
        self.reporter, self.member, self.before = reporter, member, before
        self.seconds_a_step = 0.0

    def state(self, stage: Stage) -> None:
        self.reporter.state(stage)

    def event(
        self, message: str, *, level: str = "info", type: str = "message", data: dict[str, Any] | None = None
    ) -> None:
        if data is not None:
            data = {**data, "member": self.member.number}
        words = f"member {self.member.number} of {self.member.members}: {message}"
        self.reporter.event(words, level=level, type=type, data=data)

    def metrics(self, step: int, **values: float | None) -> None:
        steps, seconds = values["total_steps"] or 0.0, values["eta_seconds"] or 0.0
        if step < steps:
            self.seconds_a_step = seconds / (steps - step)
        later = steps * (self.member.members - self.member.number)
        whole = {"total_steps": self.before + steps + later, "eta_seconds": seconds + later * self.seconds_a_step}
        self.reporter.metrics(self.before + step, **{**values, **whole, "member": self.member.number})

    def checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        self.reporter.checkpoint(self.before + step, path, metrics)

    def cancelled(self) -> bool:
        return self.reporter.cancelled()
