"""From the objective of a recipe to what computes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from export.processing.inputs import TextInput
from export.processing.text import TextProcessor
from finetune import recipe
from finetune.data.targets import Targets
from finetune.objectives import cross_entropy, numbers
from finetune.objectives.adversarial import Adversarial
from finetune.objectives.binary_cross_entropy import BinaryCrossEntropy
from finetune.objectives.chat import Chat
from finetune.objectives.elbo import Elbo
from finetune.objectives.masked_tokens import MaskedTokens
from finetune.objectives.multi_label import MultiLabel
from finetune.objectives.next_token import NextToken
from finetune.objectives.objective import Objective
from finetune.objectives.reconstruction import Reconstruction
from finetune.objectives.several import Part, Several
from finetune.objectives.translation import Translation
from finetune.origin import Reading
from finetune.task import head_task
from finetune.vocabulary import token_sizes
from models.heads import output_names
from models.spec import Binary, Classification


def build(section: recipe.Objective, targets: Targets, train: np.ndarray, reading: Reading) -> Objective:
    """targets: of the whole data set, for their labels. train: those of the training items, [items, ...]. reading: how
    the data enter the network, for objectives that show texts.

    Raises ValueError for a section that does not fit them.
    """
    match section:
        case recipe.MultiTask():
            return _several(section, targets, train)
        case recipe.Reconstruction():
            return Reconstruction(section)
        case recipe.Elbo():
            return Elbo(section)
        case recipe.Adversarial():
            return Adversarial(section)
        case recipe.Translation(label_smoothing=smoothing):
            assert isinstance(reading.input, TextInput), "pairs are texts"
            assert reading.tokenizer is not None
            assert reading.written is not None
            source = TextProcessor(reading.input, reading.tokenizer)
            return Translation(smoothing, source, TextProcessor(reading.written.spec, reading.written.tokenizer))
        case recipe.MaskedTokens():
            assert reading.tokenizer is not None, "it learns texts"
            return MaskedTokens(train, token_sizes(reading.tokenizer))
        case recipe.NextToken(packing=packing) | recipe.Chat(packing=packing):
            assert isinstance(reading.input, TextInput), "it learns texts"
            assert reading.tokenizer is not None
            row = reading.input.max_length if packing else None
            if isinstance(section, recipe.NextToken):
                return NextToken(train, token_sizes(reading.tokenizer), row=row)
            assert reading.generation is not None, "a language model has an end"
            processor, ends = TextProcessor(reading.input, reading.tokenizer), reading.generation.end_token_ids
            return Chat(train, token_sizes(reading.tokenizer), processor, ends, row=row)
        case _:
            return _head(section, targets.labels, train)


def _head(section: recipe.HeadObjective | recipe.KlDivergence, labels: Sequence[str], train: np.ndarray) -> Objective:
    match section:
        case recipe.CrossEntropy() | recipe.KlDivergence():
            return cross_entropy.build(section, labels, train)
        case recipe.BinaryCrossEntropy(positive_weight=positive_weight):
            return BinaryCrossEntropy(positive_weight, labels)
        case recipe.MultiLabel():
            return MultiLabel(labels)
        case recipe.SquaredError():
            return numbers.SquaredError(numbers.scale_of(train), labels)
        case recipe.AbsoluteError():
            return numbers.AbsoluteError(numbers.scale_of(train), labels)
        case recipe.Gaussian():
            return numbers.Gaussian(numbers.scale_of(train), labels)


def _several(section: recipe.MultiTask, targets: Targets, train: np.ndarray) -> Several:
    """The columns of the heads stand side by side: one of a class, and those of sets and numbers by their labels."""
    parts: dict[str, Part] = {}
    start = 0
    for name, head in section.heads.items():
        labels = targets.heads[name]
        task = head_task(head.objective, labels, f"head {name!r}")
        classes = isinstance(task, Classification | Binary)
        columns = slice(start, start + (1 if classes else len(labels)))
        start = columns.stop
        own = train[~np.isnan(train[:, columns]).all(axis=1), columns]
        if not len(own):
            raise ValueError(f"head {name!r}: none of the training items has a label for it")
        objective = _head(head.objective, labels, own[:, 0].astype(np.int64) if classes else own)
        parts[name] = Part(objective, output_names(task), columns, head.weight, classes)
    return Several(parts)
