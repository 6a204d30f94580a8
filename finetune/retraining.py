"""Learning from the validation split, too, once early stopping has said for how long.

Goodfellow, Bengio and Courville 2016, section 7.8: algorithm 7.2 begins anew on all data, for as many steps as were
best; algorithm 7.3 goes on from the best weights, until the validation loss is what the training loss was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import msgspec

from finetune.automatic import Chosen
from finetune.optim import learning_rate
from finetune.preprocess import Items
from finetune.recipe import Recipe, Schedule
from finetune.run_request import Reporter
from finetune.trainer import FitResult, Until
from models.network import Network

# Of the peak learning rate, for going on from where a decayed one stopped.
LEAST_SHARE = 0.1


def retrain(
    strategy: Literal["scratch", "continue"],
    network: Network,
    best: FitResult,
    both: Items,
    recipe: Recipe,
    chosen: Chosen,
    *,
    begin: Callable[[Items], Network],
    training_loss: Callable[[Network], float],
    fit: Callable[..., FitResult],
    reporter: Reporter,
) -> Network:
    """The network after learning from `both` splits.

    network, best: with the best weights, and how it came to them. begin: the network before its first step. fit:
    trainer.fit with all that does not change.
    """
    if strategy == "scratch":
        reporter.event(f"from the start again, on all {len(both):,} items, for {best.best_step:,} steps")
        network = begin(both)
        fit(network, both, recipe=recipe, chosen=chosen, until=Until(step=best.best_step))
        return network
    below = training_loss(network)
    reporter.event(f"on with all {len(both):,} items, until the validation loss is below {below:.4f}")
    rate = learning_rate(recipe.schedule, chosen.learning_rate, best.best_step - 1, best.planned)
    steady = replace(chosen, learning_rate=max(rate, LEAST_SHARE * chosen.learning_rate))
    constant = msgspec.structs.replace(recipe, schedule=Schedule(warmup=0.0, decay="constant"))
    fit(network, both, recipe=constant, chosen=steady, until=Until(below=below))
    return network
