"""Which published models can answer as one. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from export.bundle import Manifest
from export.processing.inputs import TextInput
from finetune.recipe import AbsoluteError, Gaussian, Objective, Recipe, SquaredError

# Tasks whose answers can be joined.
TASKS = ("classification", "binary", "multi_label", "regression", "multi_task")


def refusal(manifests: Sequence[Manifest]) -> str | None:
    """Why these models cannot be members of one ensemble; None when they can."""
    first, *others = manifests
    if first.task not in TASKS:
        return f"{_name(first)} answers {first.task}, and an ensemble joins {', '.join(TASKS)}"
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
    if one.model["task"] != other.model["task"]:
        return f"its task is {msgspec.json.encode(other.model['task']).decode()}"
    if type(one.input) is not type(other.input):
        return f"it reads {type(other.input).__struct_config__.tag}, not {type(one.input).__struct_config__.tag}"
    for field in one.input.__struct_fields__:
        mine, its = getattr(one.input, field), getattr(other.input, field)
        if mine != its:
            return f"its input has {field} {its}, not {mine}"
    if isinstance(one.input, TextInput) and one.files[one.input.tokenizer] != other.files[one.input.tokenizer]:
        return "its texts are cut into other tokens; models that go on from the same one share them"
    return None


def votes_on_numbers(objective: Objective) -> bool:
    """Whether there is no majority, since what is answered are numbers."""
    return isinstance(objective, SquaredError | AbsoluteError | Gaussian)


def objective_before(manifest: Manifest) -> Objective | None:
    """What a published model learned by; None when it does not say."""
    if manifest.lineage.recipe is None:
        return None
    return msgspec.convert(manifest.lineage.recipe, Recipe).objective


def _name(manifest: Manifest) -> str:
    return f"{manifest.name}:{manifest.version}"


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
