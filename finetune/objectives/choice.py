"""From the objective of a recipe to what computes it."""

from __future__ import annotations

import numpy as np

from finetune import recipe
from finetune.data.targets import Targets
from finetune.objectives import cross_entropy
from finetune.objectives.adversarial import Adversarial
from finetune.objectives.objective import Objective


def build(section: recipe.Objective, targets: Targets, train: np.ndarray) -> Objective:
    """targets: of the whole data set, for their labels. train: those of the training items, [items, ...].

    Raises ValueError for a section that does not fit them.
    """
    match section:
        case recipe.CrossEntropy() | recipe.KlDivergence():
            return cross_entropy.build(section, targets.labels, train)
        case recipe.Adversarial():
            return Adversarial(section)
    raise NotImplementedError(type(section).__name__)
