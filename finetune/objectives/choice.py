"""From the objective of a recipe to what computes it."""

from __future__ import annotations

import numpy as np

from export.processing.inputs import TextInput
from export.processing.text import TextProcessor
from finetune import recipe
from finetune.data.targets import Targets
from finetune.objectives import cross_entropy
from finetune.objectives.adversarial import Adversarial
from finetune.objectives.objective import Objective
from finetune.objectives.translation import Translation
from finetune.origin import Reading


def build(section: recipe.Objective, targets: Targets, train: np.ndarray, reading: Reading) -> Objective:
    """targets: of the whole data set, for their labels. train: those of the training items, [items, ...]. reading: how
    the data enter the network, for objectives that show texts.

    Raises ValueError for a section that does not fit them.
    """
    match section:
        case recipe.CrossEntropy() | recipe.KlDivergence():
            return cross_entropy.build(section, targets.labels, train)
        case recipe.Adversarial():
            return Adversarial(section)
        case recipe.Translation(label_smoothing=smoothing):
            assert isinstance(reading.input, TextInput), "pairs are texts"
            assert reading.tokenizer is not None
            assert reading.written is not None
            source = TextProcessor(reading.input, reading.tokenizer)
            return Translation(smoothing, source, TextProcessor(reading.written.spec, reading.written.tokenizer))
    raise NotImplementedError(type(section).__name__)
