"""How the networks of one run learn: one after the other, and once more from all data where the recipe says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune import curve, optim, trainer
from finetune.automatic import Chosen
from finetune.bagging import Member, MemberReporter
from finetune.evaluate import evaluate
from finetune.objectives.objective import Objective
from finetune.preprocess import Items
from finetune.recipe import Recipe, Transfer
from finetune.retraining import retrain
from finetune.run_request import Reporter
from finetune.terms import Term
from finetune.trainer import FitResult
from models.network import Network


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What all networks of a run have in common.

    train, validation: rows of the data set. learned: the items of some rows that a member learns from. begin: its
    network before the first step. knows: whether that has learned something before. held_out: what it is measured on
    while it learns. run: the run's fingerprint.
    """

    recipe: Recipe
    chosen: Chosen
    objective: Objective
    terms: Sequence[Term]
    train: np.ndarray
    validation: np.ndarray
    held_out: Items
    learned: Callable[[np.ndarray, Member], Items]
    begin: Callable[[Items, Member], Network]
    knows: bool
    run: str
    folder: Path
    reporter: Reporter
    check: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network with its best weights, and how it came to them. reporter: what tells of it."""

    member: Member
    network: Network
    result: FitResult
    reporter: Reporter


def train(lesson: Lesson, members: Sequence[Member]) -> list[Trained]:
    """All members, each with the weights of its best evaluation. One that has been trained is not trained again."""
    trained: list[Trained] = []
    for member in members:
        reporter = lesson.reporter
        if member.name:
            reporter = MemberReporter(reporter, member, before=sum(one.result.planned for one in trained))
        items = lesson.learned(lesson.train, member)
        network = lesson.begin(items, member)
        tell_what_learns(network, lesson.recipe.transfer, reporter)
        fit = _fit(lesson, member, reporter, lesson.run, "checkpoints")
        result = fit(network, items, recipe=lesson.recipe, chosen=lesson.chosen)
        if result.steps < result.planned:
            reporter.event(f"stopped early after {result.steps:,} of {result.planned:,} steps")
        trained.append(Trained(member=member, network=network, result=result, reporter=reporter))
    return trained


def tell_what_learns(network: Network, transfer: Transfer, reporter: Reporter) -> None:
    """Which share of the parameters, where it is not all of them."""
    counted = [sum(p.numel() for p in found(network, transfer).values()) for found in (optim.learning, optim.fixed)]
    learned, whole = counted[0], sum(counted)
    if learned < whole:
        size = f"{whole / 1e6:,.0f} M" if whole >= 1e7 else f"{whole:,}"
        reporter.event(
            f"{100 * learned / whole:.1f} % of {size} parameters learn",
            type="parameters",
            data={"learning": learned, "parameters": whole},
        )


def train_again(lesson: Lesson, trained: Sequence[Trained]) -> list[Network]:
    """The networks after learning from the validation split, too, as `recipe.stopping.retrain` says."""
    assert lesson.recipe.stopping is not None
    strategy = lesson.recipe.stopping.retrain
    assert strategy != "keep"
    return [
        retrain(
            strategy,
            one.network,
            one.result,
            lesson.learned(np.concatenate([lesson.train, lesson.validation]), one.member),
            lesson.recipe,
            lesson.chosen,
            begin=lambda both, member=one.member: lesson.begin(both, member),  # type: ignore[misc]
            training_loss=lambda network, member=one.member: _training_loss(lesson, network, member),  # type: ignore[misc]
            fit=_fit(lesson, one.member, one.reporter, f"{lesson.run} retraining", "retraining"),
            reporter=one.reporter,
        )
        for one in trained
    ]


def curves(trained: Sequence[Trained]) -> dict[str, bytes]:
    """The training curves as files, each as a picture and as numbers."""
    found = {}
    for one in trained:
        name = f"{one.member.name}-training_curve" if one.member.name else "training_curve"
        found[f"{name}.png"] = curve.plot(one.result)
        found[f"{name}.json"] = curve.numbers(one.result)
    return found


def _fit(lesson: Lesson, member: Member, reporter: Reporter, run: str, folder: str) -> Callable[..., FitResult]:
    def fit(network: Network, items: Items, **how: object) -> FitResult:
        return trainer.fit(
            network,
            items,
            lesson.held_out,
            lesson.objective,
            seed=member.seed,
            run=run + member.name,
            folder=lesson.folder / folder / member.name,
            reporter=reporter,
            terms=lesson.terms,
            **how,  # type: ignore[arg-type]
        )

    return fit


def _training_loss(lesson: Lesson, network: Network, member: Member) -> float:
    items = lesson.learned(lesson.train, member)
    return evaluate(network, items, lesson.objective, 2 * lesson.chosen.batch_size, lesson.check).loss
