"""From a recipe's objective to the task of the network that learns it. No torch."""

from __future__ import annotations

from finetune import recipe
from finetune.data.targets import Targets
from finetune.recipe import Adversarial, Objective, Recipe
from models import spec
from models.catalog import ARCHITECTURES
from models.spec import HeadTask, Task

# What an architecture learns by when the recipe does not say.
DEFAULTS: dict[str, Objective] = {
    "cross_entropy": recipe.CrossEntropy(),
    "adversarial": recipe.Adversarial(),
    "translation": recipe.Translation(),
}
# The tag of the task that each teaches.
TASKS: dict[type[Objective], str] = {
    recipe.CrossEntropy: "classification",
    recipe.KlDivergence: "classification",
    recipe.BinaryCrossEntropy: "binary",
    recipe.MultiLabel: "multi_label",
    recipe.SquaredError: "regression",
    recipe.AbsoluteError: "regression",
    recipe.Gaussian: "regression",
    recipe.MultiTask: "multi_task",
    recipe.Adversarial: "generation",
    recipe.Translation: "translation",
}


def name_of(objective: Objective) -> str:
    """ "cross_entropy", ..."""
    return str(type(objective).__struct_config__.tag)


def objective_of(given: Objective | None, architecture: str) -> Objective:
    """What `architecture` learns when a recipe says `given`. Raises ValueError when it cannot."""
    possible = ARCHITECTURES[architecture].objectives
    if given is None:
        return DEFAULTS[possible[0]]
    if name_of(given) not in possible:
        raise ValueError(f"objective: {architecture} cannot learn by {name_of(given)}; it can by {', '.join(possible)}")
    return given


def contradiction(objective: Objective, recipe: Recipe) -> tuple[str, str] | None:
    """A field of the recipe that makes no sense with its objective, and why; None when there is none."""
    if not isinstance(objective, Adversarial):
        return None
    stopping, augmentation = recipe.stopping, recipe.augmentation
    if recipe.transfer.freeze is not None:
        return "transfer.freeze", "transfer.freeze: each player of an adversarial game learns as a whole"
    if augmentation.mixup or augmentation.cutmix:
        field = "augmentation.mixup" if augmentation.mixup else "augmentation.cutmix"
        return field, f"{field}: mixed images are none that a generator is to make"
    if recipe.terms:
        return "terms", "terms: an adversarial game has no head whose answers or features could be penalized"
    told = "the loss of an adversarial game does not tell how good the images are"
    if stopping is not None and stopping.metric == "loss":
        return "stopping.metric", f"stopping.metric: {told}; take frechet_distance"
    if stopping is not None and stopping.retrain == "continue":
        return "stopping.retrain", f"stopping.retrain: {told}; take scratch"
    if recipe.schedule.decay == "plateau":
        return "schedule.decay", f"schedule.decay: {told}; take cosine, linear, step or constant"
    return None


def task_of(objective: Objective, targets: Targets) -> Task:
    """The task that `objective` teaches with these targets. Raises ValueError when they do not fit it."""
    if isinstance(objective, recipe.MultiTask):
        heads = {name: _head(head.objective, targets.heads[name], name) for name, head in objective.heads.items()}
        return spec.MultiTask(heads)
    if isinstance(objective, recipe.Adversarial):
        return spec.Generation()
    if isinstance(objective, recipe.Translation):
        return spec.Translation()
    return _head(objective, targets.labels, "objective")


def _head(objective: Objective, labels: list[str], where: str) -> HeadTask:
    match objective:
        case recipe.BinaryCrossEntropy():
            if len(labels) != 2:
                raise ValueError(
                    f"{where}: binary_cross_entropy tells two classes apart, the data have {len(labels)}: "
                    f"{', '.join(labels[:10])}; take cross_entropy"
                )
            return spec.Binary()
        case recipe.MultiLabel():
            return spec.MultiLabel(len(labels))
        case recipe.SquaredError() | recipe.AbsoluteError():
            return spec.Regression(len(labels))
        case recipe.Gaussian():
            return spec.Regression(len(labels), "gaussian")
        case _:
            return spec.Classification(len(labels))


def describe(task: Task, targets: Targets) -> str:
    """What is learned, in words."""
    match task:
        case spec.Classification() | spec.Binary():
            return f"{len(targets.labels)} classes"
        case spec.MultiLabel(labels):
            return f"{labels} labels"
        case spec.Regression(count):
            return f"{count} number{'s' if count > 1 else ''}"
        case spec.MultiTask(heads):
            return f"{len(heads)} tasks at once ({', '.join(heads)})"
        case spec.Generation():
            return "to make images"
    return spec.tag(task).replace("_", " ")
