"""How good trained networks are on data held out, and what of it may be learned from once that is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from export.reports.evaluation import Evaluation
from finetune.bagging import together
from finetune.evaluate import Measured, evaluate, report
from finetune.lesson import Lesson, Trained, train_again
from finetune.lora import adapters_off
from finetune.preprocess import Items
from models.network import Network


@dataclass(frozen=True, kw_only=True)
class Judged:
    """network: what is published. evaluation: on the test items, on those of validation where there are none.
    validated: figures on the validation items, of what has not learned from them."""

    network: Network
    evaluation: Evaluation
    validated: Mapping[str, float]


def judge(network: Network, trained: Sequence[Trained], lesson: Lesson, test: Items) -> Judged:
    """Measure `network`, all that was `trained` together; then let it learn from the validation split, too, where the
    recipe says so."""
    validation, objective, reporter = lesson.held_out, lesson.objective, lesson.reporter

    def answered(network: Network, items: Items) -> Measured:
        return evaluate(network, items, objective, 2 * lesson.chosen.batch_size, lesson.check)

    on_validation = cache(lambda: answered(network, validation))  # asked for twice, before anything is learned again

    def measure(network: Network, items: Items, words: str) -> Evaluation:
        measured = on_validation() if items is validation else answered(network, items)
        found = objective.examined(network, items, report(measured, items, objective), lesson.check)
        figures = found.figures()
        shown = ", ".join(f"{name.replace('_', ' ')} {figures[name]:.4f}" for name in objective.metrics or figures)
        reporter.event(f"{shown} on {found.samples:,} {words}", type="evaluation", data=figures)
        if not trained or not lesson.knows or not objective.compares:
            return found
        both, sentence = objective.compared(found, before(items))
        reporter.event(sentence, type="comparison", data=both.figures())
        return both

    def before(items: Items) -> Evaluation:
        """Of the network that the first member began with: without its adapter, which is all that has learned of one
        that is compared."""
        if lesson.recipe.transfer.lora is not None:
            with adapters_off(trained[0].network):
                return report(answered(trained[0].network, items), items, objective)
        member, device = trained[0].member, next(network.parameters()).device
        untouched = lesson.begin(lesson.learned(lesson.train, member), member).to(device)
        return report(answered(untouched, items), items, objective)

    def calibrate() -> None:
        objective.calibrate(on_validation().kept, validation.targets)
        if not objective.intervals():
            reporter.event(
                f"{len(validation):,} validation items are too few to tell in which interval 95 in 100 numbers lie",
                level="warn",
            )

    # Intervals hold for the weights that are published, and how well they do is seen on items they were not taken from.
    stopping = lesson.recipe.stopping
    keeps = stopping is None or stopping.retrain == "keep"
    calibrates = objective.calibrates and keeps
    if calibrates and len(test):
        calibrate()
    held_out, which = (test, "test") if len(test) else (validation, "validation")
    only = trained[0].result if len(trained) == 1 else None
    weights = f", with the weights of step {only.best_step:,}" if only else ""
    found = measure(network, held_out, f"{which} items{weights}")
    if calibrates and not len(test):
        calibrate()
    together_on = measure(network, validation, "validation items") if len(test) and not only else found
    validated = only.best_metrics if only else together_on.figures()
    if trained and not keeps:
        network = together(train_again(lesson, trained), lesson.recipe.ensemble)
        if len(test):
            found = measure(network, test, "test items, after learning from the validation split, too")
        else:
            reporter.event("the figures stay those from before: what they were measured on has been learned from now")
    return Judged(network=network, evaluation=found, validated=validated)
