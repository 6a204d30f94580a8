"""From a recipe's objective to the task of the network that learns it. No torch."""

from __future__ import annotations

from finetune import recipe
from finetune.data.targets import Targets
from finetune.recipe import Adversarial, Objective, Recipe
from models import spec
from models.catalog import ARCHITECTURES, AutoencoderParameters, hyperparameters
from models.spec import HeadTask, ModelSpec, Task

# What an architecture learns by when the recipe does not say.
DEFAULTS: dict[str, Objective] = {
    "cross_entropy": recipe.CrossEntropy(),
    "reconstruction": recipe.Reconstruction(),
    "elbo": recipe.Elbo(),
    "adversarial": recipe.Adversarial(),
    "translation": recipe.Translation(),
    "next_token": recipe.NextToken(),
    "chat": recipe.Chat(),
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
    recipe.Reconstruction: "reconstruction",
    recipe.Elbo: "reconstruction",
    recipe.MaskedTokens: "masked_language_model",
    recipe.NextToken: "language_model",
    recipe.Chat: "language_model",
    recipe.Translation: "translation",
}
# Those whose graph can be judged in other precisions: it answers in one run, as the metrics are computed.
OPTIMIZED = ("classification", "binary", "multi_label", "regression", "multi_task")
# Figures that stopping may watch beside "loss". Of a multi-task objective they are "<head>.<figure>".
METRICS: dict[type[Objective], tuple[str, ...]] = {
    recipe.CrossEntropy: ("accuracy", "macro_f1"),
    recipe.KlDivergence: ("accuracy", "macro_f1"),
    recipe.BinaryCrossEntropy: ("accuracy", "macro_f1", "roc_auc"),
    recipe.MultiLabel: ("subset_accuracy", "micro_f1", "macro_f1"),
    recipe.SquaredError: ("mae", "rmse", "r2"),
    recipe.AbsoluteError: ("mae", "rmse", "r2"),
    recipe.Gaussian: ("mae", "rmse", "r2"),
    recipe.Adversarial: ("frechet_distance", "discriminator_accuracy"),
    recipe.Reconstruction: ("error", "explained_variance"),
    recipe.Elbo: ("error", "explained_variance", "surprise", "kl"),
    recipe.MaskedTokens: ("perplexity", "token_accuracy"),
    recipe.NextToken: ("perplexity", "token_accuracy"),
    recipe.Chat: ("perplexity", "token_accuracy"),
    recipe.Translation: ("perplexity", "token_accuracy"),
}


def metrics_of(objective: Objective) -> tuple[str, ...]:
    """What stopping may watch beside "loss"."""
    if isinstance(objective, recipe.MultiTask):
        heads = objective.heads.items()
        return tuple(f"{head}.{name}" for head, one in heads for name in METRICS[type(one.objective)])
    return METRICS[type(objective)]


def name_of(objective: Objective) -> str:
    """ "cross_entropy", ..."""
    return str(type(objective).__struct_config__.tag)


def objective_of(given: Objective | None, architecture: str, *, chats: bool = False) -> Objective:
    """What `architecture` learns when a recipe says `given`. chats: whether the data are conversations, which is what
    it then learns if it can and nothing else is given. Raises ValueError when it cannot learn what is given."""
    possible = ARCHITECTURES[architecture].objectives
    if given is None and chats and "chat" in possible:
        return recipe.Chat()
    if given is None:
        return DEFAULTS[possible[0]]
    if name_of(given) not in possible:
        raise ValueError(f"objective: {architecture} cannot learn by {name_of(given)}; it can by {', '.join(possible)}")
    return given


def contradiction(objective: Objective, recipe: Recipe) -> tuple[str, str] | None:
    """A field of the recipe that makes no sense with its objective, and why; None when there is none."""
    measured = ("loss", *metrics_of(objective))
    if recipe.stopping is not None and recipe.stopping.metric not in measured:
        return "stopping.metric", (
            f"stopping.metric: {name_of(objective)} does not measure {recipe.stopping.metric}; it measures "
            f"{', '.join(measured)}"
        )
    if recipe.quantization is not None and TASKS[type(objective)] != "language_model":
        return "quantization", (
            f"quantization: it is judged by how a language model predicts, and {name_of(objective)} teaches "
            f"{TASKS[type(objective)].replace('_', ' ')}"
        )
    if recipe.optimization is not None and TASKS[type(objective)] not in OPTIMIZED:
        instead = "; take quantization" if TASKS[type(objective)] == "language_model" else ""
        return "optimization", (
            f"optimization: it is for {', '.join(OPTIMIZED)}, and {name_of(objective)} teaches "
            f"{TASKS[type(objective)].replace('_', ' ')}{instead}"
        )
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


def wants_layers(recipe: Recipe, architecture: str, *, random: bool) -> tuple[str, str] | None:
    """A field of the recipe that is for a Transformer's layers, or for pre-trained ones, and why `architecture` cannot
    have it; None when it can. random: whether it begins with random weights."""
    transformer = ARCHITECTURES[architecture].transformer
    if recipe.transfer.lora is not None and not transformer:
        return "transfer.lora", (
            f"transfer.lora: adapts the linear layers of a Transformer, and {architecture} is none; "
            "transfer.freeze and transfer.train_last hold back what is not to learn"
        )
    if recipe.transfer.lora is not None and random:
        return "transfer.lora", (
            f"transfer.lora: {architecture} begins with random weights here, which an adapter would leave as they are; "
            "learn it whole, or name a backbone or a published model"
        )
    if recipe.gradient_checkpointing and not transformer:
        return "gradient_checkpointing", (
            f"gradient_checkpointing: computes a Transformer's layers again, and {architecture} is none; lower "
            "batch_size instead (gradient_accumulation keeps the step as large)"
        )
    return None


def suits(objective: Objective, model: ModelSpec) -> None:
    """Raises ValueError when the hyper-parameters of `model` are not what `objective` needs."""
    sparsity = objective.sparsity if isinstance(objective, recipe.Reconstruction) else None
    parameters = hyperparameters(model)
    if (
        isinstance(sparsity, recipe.KlSparsity)
        and isinstance(parameters, AutoencoderParameters)
        and parameters.code_activation != "sigmoid"
    ):
        raise ValueError(
            f"objective.sparsity: kl needs units between 0 and 1, and the code of this model is "
            f"{parameters.code_activation}; give it code_activation sigmoid, or take l1"
        )


def task_of(objective: Objective, targets: Targets) -> Task:
    """The task that `objective` teaches with these targets. Raises ValueError when they do not fit it."""
    if isinstance(objective, recipe.Reconstruction | recipe.Elbo):
        return spec.Reconstruction()
    if isinstance(objective, recipe.MultiTask):
        heads = {
            name: head_task(head.objective, targets.heads[name], f"head {name!r}")
            for name, head in objective.heads.items()
        }
        return spec.MultiTask(heads)
    if isinstance(objective, recipe.Adversarial):
        return spec.Generation()
    if isinstance(objective, recipe.MaskedTokens):
        return spec.MaskedLanguageModel()
    if isinstance(objective, recipe.NextToken | recipe.Chat):
        return spec.LanguageModel()
    if isinstance(objective, recipe.Translation):
        return spec.Translation()
    return head_task(objective, targets.labels, "objective")


def head_task(objective: Objective, labels: list[str], where: str) -> HeadTask:
    """The task of one head. Raises ValueError, that names `where`, when these labels do not fit."""
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
        case spec.Reconstruction():
            return "to reconstruct"
        case spec.MaskedLanguageModel():
            return "hidden tokens"
        case spec.LanguageModel():
            return "the next token"
    return spec.tag(task).replace("_", " ")
