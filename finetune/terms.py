"""Loss terms: what a recipe adds to the loss of its objective, in training only; what is measured stays comparable."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from finetune import recipe
from finetune.preprocess import Items, tensors
from models.spec import Binary, Classification, HeadTask, MultiLabel, MultiTask, Task

# What augmentation makes of graph inputs.
Change = Callable[[list[Tensor]], list[Tensor]]
# From a network, what it answered for a batch, and the augmentation: the mean of the term over the batch.
Term = Callable[[nn.Module, Mapping[str, Tensor], Change], Tensor]


def build(section: recipe.Term, task: Task, unlabelled: Mapping[str, Items]) -> Term:
    """unlabelled: items of other domains, by the names that the recipe has for their files. Raises ValueError when the
    network of `task` answers nothing that the term is about."""
    match section:
        case recipe.ConfidencePenalty(weight=weight):
            logits = _logits(task)
            return lambda model, outputs, change: weight * confidence(outputs, logits)
        case recipe.FeaturePenalty(weight=weight, norm=norm):
            return lambda model, outputs, change: weight * features(outputs).abs().pow(norm).mean()
        case recipe.Coral(weight=weight, file=file):
            items = unlabelled[file]
            return lambda model, outputs, change: weight * adaptation(model, outputs, change, items)


def confidence(outputs: Mapping[str, Tensor], logits: Mapping[str, bool]) -> Tensor:
    """-H of the answered distributions, in nats: the mean over the batch, the sum over the heads.

    logits: of `outputs`, whether one is of classes (softmax) or of labels (a sigmoid each, of which the mean counts).
    """
    total = torch.zeros((), device=outputs[next(iter(logits))].device)
    for name, classes in logits.items():
        values = outputs[name].float()
        if classes:
            chances = values.log_softmax(dim=1)
            total = total + (chances.exp() * chances).sum(dim=1).mean()
        else:
            total = total + (values * values.sigmoid() - softplus(values)).mean()
    return total


def features(outputs: Mapping[str, Tensor]) -> Tensor:
    """float32 [batch, width]: what the layer before the head answers. Raises ValueError when there is none."""
    if "embedding" not in outputs:
        raise ValueError("terms: this network has no layer before the head that a term could be about")
    return outputs["embedding"].float()


def adaptation(model: nn.Module, outputs: Mapping[str, Tensor], change: Change, items: Items) -> Tensor:
    """The CORAL loss against as many of `items` as the batch has, drawn by torch's generator: another draw at each
    step, the same one whenever that step is done again."""
    source = features(outputs)
    drawn = torch.randperm(len(items))[: len(source)].numpy()
    target = features(model(*change(tensors(items.batch(drawn), source.device))))
    return coral(source, target)


def coral(source: Tensor, target: Tensor) -> Tensor:
    """‖C_source - C_target‖² / (4 width²), Frobenius norm, of the covariances of float32 [batch, width] each (Sun and
    Saenko 2016, "Deep CORAL"); 0 for a batch of one, which has no covariance."""
    if min(len(source), len(target)) < 2:
        return 0.0 * (source.sum() + target.sum())
    return (covariance(source) - covariance(target)).square().sum() / (4 * source.shape[1] ** 2)


def covariance(values: Tensor) -> Tensor:
    """[width, width] of [items, width], divided by items - 1."""
    centred = values - values.mean(dim=0)
    return centred.T @ centred / (len(values) - 1)


def _logits(task: Task) -> dict[str, bool]:
    """Names of the outputs that are logits; whether of classes or of labels."""
    parts: Mapping[str, Task | HeadTask] = (
        {f"logits_{name}": one for name, one in task.heads.items()} if isinstance(task, MultiTask) else {"logits": task}
    )
    found = {
        name: isinstance(one, Classification)
        for name, one in parts.items()
        if isinstance(one, Classification | Binary | MultiLabel)
    }
    if not found:
        raise ValueError("terms: confidence is for answers of classes or labels")
    return found
