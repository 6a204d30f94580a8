"""Which networks can answer as one. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from export.bundle import Manifest
from export.processing.inputs import TextInput
from finetune.recipe import AbsoluteError, Ensemble, Gaussian, McDropout, Objective, Recipe, SquaredError
from finetune.task import TASKS
from models.catalog import COMPOSED, MADE_OF_OTHERS, Hyperparameters

# Tasks whose answers can be joined.
JOINABLE = ("classification", "binary", "multi_label", "regression", "multi_task")


def contradiction(section: Ensemble, objective: Objective, architecture: str | None) -> str | None:
    """Why nothing that learns by `objective` can be put together as `section` says; None when it can."""
    if (task := TASKS[type(objective)]) not in JOINABLE:
        return f"ensemble: answers of {task} cannot be joined; those of {', '.join(JOINABLE)} can"
    numbers = isinstance(objective, SquaredError | AbsoluteError | Gaussian)
    if numbers and not isinstance(section, McDropout) and section.vote == "majority":
        return "ensemble.vote: numbers have no majority; take the mean"
    if isinstance(section, McDropout) and architecture in COMPOSED:
        return f"ensemble: {MADE_OF_OTHERS.format(architecture)}"
    return None


def drops_nothing(parameters: Hyperparameters) -> bool:
    """Whether a network of these hyper-parameters has no dropout; one whose own configuration may have some has."""
    rates = [field for field in parameters.__struct_fields__ if field.endswith("dropout")]
    return getattr(parameters, "config", None) is None and not any(getattr(parameters, field) for field in rates)


def refusal(manifests: Sequence[Manifest]) -> str | None:
    """Why these models cannot be members of one ensemble; None when they can."""
    first, *others = manifests
    if first.task not in JOINABLE:
        return f"{_name(first)} answers {first.task}, and an ensemble joins {', '.join(JOINABLE)}"
    seen = {_name(first)}
    for other in others:
        if _name(other) in seen:
            return f"{_name(other)} is named twice"
        seen.add(_name(other))
        if why := _unlike(first, other):
            return f"{_name(other)} cannot be joined with {_name(first)}: {why}"
    return None


def _unlike(one: Manifest, other: Manifest) -> str | None:
    if one.task != other.task:
        return f"it answers {other.task}, not {one.task}"
    if one.labels != other.labels:
        return f"it answers {_shown(other.labels)}, not {_shown(one.labels)}"
    if one.heads != other.heads:
        return f"it has the heads {_shown(list(other.heads))}, and not with the same labels"
    if one.model.get("task") != other.model.get("task"):
        return f"its task is {msgspec.json.encode(other.model.get('task')).decode()}"
    if type(one.input) is not type(other.input):
        return f"it reads {type(other.input).__struct_config__.tag}, not {type(one.input).__struct_config__.tag}"
    for field in one.input.__struct_fields__:
        mine, its = getattr(one.input, field), getattr(other.input, field)
        if mine != its:
            return f"its input has {field} {its}, not {mine}"
    if isinstance(one.input, TextInput) and one.files[one.input.tokenizer] != other.files[one.input.tokenizer]:
        return "its texts are cut into other tokens; models that go on from the same one share them"
    return None


def objective_before(manifest: Manifest) -> Objective | None:
    """What a published model learned by; None when it does not say."""
    if manifest.lineage.recipe is None:
        return None
    return msgspec.convert(manifest.lineage.recipe, Recipe).objective


def _name(manifest: Manifest) -> str:
    return f"{manifest.name}:{manifest.version}"


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
