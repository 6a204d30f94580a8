"""Where training begins: random weights, a pre-trained backbone, or a model that was published before."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.torch import load_file

from export import bundle
from export.bundle import Generation, Manifest
from export.processing.images import open_image
from export.processing.inputs import DataInput, ImageInput, LatentInput, SeriesInput, TextInput, VectorInput
from finetune import ensembles
from finetune.automatic import Beginning
from finetune.chat_tokens import CHATML, START
from finetune.data.chats import Conversation
from finetune.data.chats import texts as texts_of
from finetune.data.datasets import Dataset
from finetune.data.targets import Targets
from finetune.preprocess import Written
from finetune.recipe import Joined, Recipe
from finetune.vocabulary import BOS, EOS, PAD, tokens_of, train_tokenizer
from models import catalog, registry
from models.backbones import weights
from models.network import Network
from models.spec import LanguageModel, ModelSpec, Task

# Images whose headers are read to choose how images are brought to size.
LOOKED_AT = 200
# Parameters of a trunk: of the network itself, or of one that it is made of, whose masks go on with it.
TRUNK = re.compile(r"(member\.|members\.\d+\.)*(trunk\.|mask\d)")
# Tokens that a text may have, and pixels of an image's side, where neither recipe nor model says.
TEXT_LENGTH = 256
IMAGE_SIZE = 32
# Tokens of a text that a decoder, which could read more, learns from at once.
DECODER_LENGTH = 1024
TARGET_TOKENIZER = "target_tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """name: for the lineage. spec: complete but for what the data say. folder, manifest: of a published model."""

    name: str
    spec: ModelSpec
    folder: Path | None = None
    manifest: Manifest | None = None

    @property
    def beginning(self) -> Beginning:
        if self.spec.weights is not None:
            return "backbone"
        return "random" if self.folder is None else "learned"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data enter a network: its complete spec, the graph's input, and for texts the tokenizer.json. written: the
    texts that it learns to write. generation, chat_template: of a language model; the template itself."""

    spec: ModelSpec
    input: DataInput
    tokenizer: bytes | None = None
    written: Written | None = None
    generation: Generation | None = None
    chat_template: str | None = None


def find(model: str | ModelSpec, repository: Path, backbones: Mapping[str, str]) -> Origin:
    """What a recipe's `model` names: a packaged backbone, one of the operator's `backbones`, a published model
    ("name" is its newest version, "name:3" its third), an architecture, a folder or a hub id, in this order.

    Raises ValueError when there is nothing of that name, DamagedBundle when the published model is not whole.
    """
    architecture = model.architecture if isinstance(model, ModelSpec) else model
    if architecture in catalog.COMPOSED and not (isinstance(model, str) and model in bundle.names(repository)):
        raise ValueError(f"model: {catalog.MADE_OF_OTHERS.format(architecture)}")
    if isinstance(model, ModelSpec):
        return Origin(name=model.weights or model.architecture, spec=weights.complete(model, backbones))
    name, _, version = model.partition(":")
    if model in catalog.BACKBONES or model in backbones or name not in bundle.names(repository):
        return Origin(name=model, spec=weights.spec_for(model, backbones))
    versions = bundle.versions(repository, name)
    if version and not (version.isdecimal() and int(version) in versions):
        raise ValueError(f"model: {name} has no version {version!r}; it has {', '.join(map(str, versions))}")
    number = int(version) if version else versions[-1]
    folder = repository / name / str(number)
    manifest = bundle.verify(folder)
    spec = msgspec.convert(manifest.model, ModelSpec)
    return Origin(name=f"{name}:{number}", spec=spec, folder=folder, manifest=manifest)


def joined(first: Origin, recipe: Recipe, repository: Path, backbones: Mapping[str, str]) -> list[Origin]:
    """The published models that the recipe joins, `first` among them; none when it joins none.

    Raises ValueError as `find` does, and when they cannot be joined.
    """
    if not isinstance(recipe.ensemble, Joined):
        return []
    for name in recipe.ensemble.models:
        if name.partition(":")[0] not in bundle.names(repository):
            raise ValueError(f"ensemble.models: no model {name!r} is published; only published ones are joined")
    if first.manifest is None:
        raise ValueError(f"model: {first.name} is not published; only published models are joined")
    found = [first, *(find(name, repository, backbones) for name in recipe.ensemble.models)]
    if why := ensembles.refusal([one.manifest for one in found if one.manifest]):
        raise ValueError(f"ensemble.models: {why}")
    return found


def must_read(one: Origin, dataset: Dataset, reading: Reading) -> None:
    """Raises ValueError when `dataset` does not have the labels and the input of a model that is not trained."""
    assert one.manifest is not None
    before = {name: head.labels for name, head in one.manifest.heads.items()}
    if (dataset.labels, dataset.answers.heads) != (one.manifest.labels, before):
        raise ValueError(
            f"the data have the labels {', '.join(dataset.labels[:10])}; {one.name} answers "
            f"{', '.join(one.manifest.labels[:10])}"
        )
    if reading.input != one.manifest.input:
        raise ValueError(f"{one.name} reads {one.manifest.input}, the data are {reading.input}")


def read(
    origin: Origin, recipe: Recipe, dataset: Dataset, learned: np.ndarray, task: Task, backbones: Mapping[str, str]
) -> Reading:
    """How `dataset` enters the network: the recipe's image size or text length, else the model's own.

    learned: the training items, which a new vocabulary is taken from. Raises ValueError when the model cannot read
    such data.
    """
    parameters = catalog.hyperparameters(origin.spec)
    if isinstance(parameters, catalog.EnsembleParameters | catalog.McDropoutParameters):
        return _read_for_all(origin, parameters, recipe, dataset, learned, task, backbones)
    before = origin.manifest.input if origin.manifest else None
    if isinstance(before, LatentInput):
        before = before.images
    if dataset.kind == "table":
        if isinstance(parameters, catalog.CodingParameters) and parameters.image_size is not None:
            raise ValueError(f"the data are vectors, {origin.name} reads images")
        features, known = len(dataset.content(0)), getattr(parameters, "features", None)
        if known not in (None, features):
            raise ValueError(f"the data have {features} columns of numbers, {origin.name} takes {known}")
        spec = _complete(origin.spec, task, features=features)
        return Reading(spec=spec, input=VectorInput(features=features, names=dataset.features))
    if isinstance(parameters, catalog.TranslationParameters):
        return _read_pairs(origin, parameters, recipe, dataset, learned, task)
    if isinstance(parameters, catalog.SequenceParameters | catalog.TransformerParameters):
        if isinstance(parameters, catalog.SequenceParameters):
            if dataset.kind == "series":
                return _read_series(origin, parameters, recipe, dataset, task)
            if parameters.channels is not None:
                raise ValueError(f"the data are texts, {origin.name} reads series")
        return _read_words(origin, parameters, recipe, dataset, learned, task)
    if isinstance(parameters, catalog.CausalDecoderParameters):
        return _read_continued(origin, parameters, recipe, dataset, task, backbones)
    if isinstance(parameters, catalog.TextEncoderParameters):
        return _read_texts(origin, parameters, recipe, task, backbones)
    assert dataset.kind == "images"
    if isinstance(parameters, catalog.CodingParameters) and parameters.features is not None:
        raise ValueError(f"the data are images, {origin.name} reads vectors")
    size: int = recipe.image_size or getattr(parameters, "image_size") or IMAGE_SIZE  # noqa: B009 - all for images have it
    if isinstance(parameters, catalog.GanParameters) and origin.folder and size != parameters.image_size:
        raise ValueError(f"image_size: {origin.name} makes images of {parameters.image_size} pixels a side, not {size}")
    spec = _complete(origin.spec, task, image_size=size)
    if isinstance(before, ImageInput):
        return Reading(spec=spec, input=msgspec.structs.replace(before, height=size, width=size))
    return Reading(spec=spec, input=image_input(dataset, size))


def _read_for_all(
    origin: Origin,
    parameters: catalog.EnsembleParameters | catalog.McDropoutParameters,
    recipe: Recipe,
    dataset: Dataset,
    learned: np.ndarray,
    task: Task,
    backbones: Mapping[str, str],
) -> Reading:
    """As each of the networks that a published one is made of reads it."""

    def read_for(member: ModelSpec) -> Reading:
        return read(replace(origin, spec=member), recipe, dataset, learned, task, backbones)

    if isinstance(parameters, catalog.McDropoutParameters):
        reading = read_for(parameters.member)
        return replace(reading, spec=_complete(origin.spec, task, member=msgspec.to_builtins(reading.spec)))
    readings = [read_for(member) for member in parameters.members]
    members = msgspec.to_builtins([reading.spec for reading in readings])
    return replace(readings[0], spec=_complete(origin.spec, task, members=members))


def image_input(dataset: Dataset, size: int) -> ImageInput:
    """How images are brought to size × size: "stretch" when most are (nearly) square and no larger than that, as
    drawn digits or icons are, since every pixel of theirs counts; else "crop", ImageNet's way with photographs."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int))
    sizes = np.array([open_image(dataset.content(int(row))).size for row in rows])
    small_and_square = (sizes.max(axis=1) <= size) & (sizes.max(axis=1) <= 1.1 * sizes.min(axis=1))
    if small_and_square.mean() > 0.5:
        return ImageInput(height=size, width=size, resize="stretch", crop_fraction=1.0)
    return ImageInput(height=size, width=size)


def load(origin: Origin, spec: ModelSpec, targets: Targets, backbones: Mapping[str, str]) -> Network:
    """The network of `spec` with the weights of its origin; what they lack, the head mostly, is random.

    Of a published model everything is kept when it does the same task with the same labels, in this order; else the
    trunk, which is all that another task's network has in common with it. Raises ValueError when weights do not fit.
    """
    network = registry.build(spec)
    if origin.folder is None or origin.manifest is None:
        if spec.weights is not None:
            weights.load(network, spec.weights, backbones)
        return network
    state = registry.whole(network, load_file(origin.folder / registry.WEIGHTS))
    keeps = keeps_head(origin, spec, targets)
    try:
        absent = network.load_state_dict(
            {name: tensor for name, tensor in state.items() if keeps or TRUNK.match(name)}, strict=False
        )
    except RuntimeError as error:
        raise ValueError(f"the weights of {origin.name} do not fit: {error}") from error
    missing = [name for name in absent.missing_keys if keeps or TRUNK.match(name)]
    if missing or absent.unexpected_keys:
        raise ValueError(f"the weights of {origin.name} do not fit: {(missing + absent.unexpected_keys)[0]}")
    return network


def keeps_head(origin: Origin, spec: ModelSpec, targets: Targets) -> bool:
    """Whether the head of a published model goes on: it does the same task, with the same labels in the same order."""
    if origin.manifest is None:
        return False
    before = {name: head.labels for name, head in origin.manifest.heads.items()}
    return (origin.spec.task, origin.manifest.labels, before) == (spec.task, targets.labels, targets.heads)


def _read_texts(
    origin: Origin,
    parameters: catalog.TextEncoderParameters,
    recipe: Recipe,
    task: Task,
    backbones: Mapping[str, str],
) -> Reading:
    longest = (parameters.config or {}).get("max_position_embeddings")
    length = recipe.max_length or parameters.max_length
    if isinstance(longest, int) and length > longest:
        raise ValueError(f"max_length: {length} tokens, but {origin.name} reads at most {longest}")
    if origin.folder is not None and origin.manifest is not None and isinstance(origin.manifest.input, TextInput):
        input = msgspec.structs.replace(origin.manifest.input, max_length=length)
        tokenizer = (origin.folder / input.tokenizer).read_bytes()
    elif origin.spec.weights is not None:
        tokenizer, padding = weights.tokenizer_json(origin.spec.weights, backbones)
        input = TextInput(max_length=length, pad_token_id=padding)
    else:
        raise ValueError("model: a text_encoder needs `weights`, its tokenizer comes with them")
    return Reading(spec=_complete(origin.spec, task, max_length=length), input=input, tokenizer=tokenizer)


def _read_continued(
    origin: Origin,
    parameters: catalog.CausalDecoderParameters,
    recipe: Recipe,
    dataset: Dataset,
    task: Task,
    backbones: Mapping[str, str],
) -> Reading:
    """Texts that a decoder of a checkpoint goes on with, in the language that it was trained in. max_length is what is
    learned from at once; what is written later may be as long as before."""
    folder, manifest, context = origin.folder, origin.manifest, parameters.max_length
    assert context is not None, "a complete spec has it"
    length = recipe.max_length or min(context, DECODER_LENGTH)
    if length > context:
        raise ValueError(f"max_length: {length} tokens, but {origin.name} reads at most {context}")
    template: str | None
    if folder is not None and manifest is not None and isinstance(manifest.input, TextInput):
        assert manifest.generation is not None, "a published decoder has it"
        input = msgspec.structs.replace(manifest.input, max_length=length)
        tokenizer, ends = (folder / input.tokenizer).read_bytes(), manifest.generation.end_token_ids
        file = manifest.generation.chat_template
        template = (folder / file).read_text() if file is not None else None
    elif origin.spec.weights is not None:
        language = weights.language_of(origin.spec.weights, backbones)
        input = TextInput(
            max_length=length,
            pad_token_id=language.padding,
            bos_token_id=language.beginning,
            eos_token_id=language.ends[0],
        )
        tokenizer, ends, template = language.tokenizer, list(language.ends), language.chat_template
    else:
        raise ValueError("model: a causal_decoder needs `weights`, its tokenizer comes with them")
    return Reading(
        spec=_complete(origin.spec, task),
        input=input,
        tokenizer=tokenizer,
        generation=Generation(context=context, end_token_ids=ends),
        chat_template=template or default_template(dataset),
    )


def default_template(dataset: Dataset) -> str | None:
    """How chats are written by a model that learns them from this data and has no template of its own."""
    return CHATML if isinstance(dataset.content(0), Conversation) else None


def _read_series(
    origin: Origin, parameters: catalog.SequenceParameters, recipe: Recipe, dataset: Dataset, task: Task
) -> Reading:
    if parameters.vocabulary is not None:
        raise ValueError(f"the data are series, {origin.name} reads texts")
    shapes = [dataset.content(item).shape for item in range(len(dataset))]
    channels = shapes[0][1]
    if parameters.channels not in (None, channels):
        raise ValueError(f"the steps of the data have {channels} numbers, {origin.name} takes {parameters.channels}")
    longest = max(range(len(shapes)), key=lambda item: shapes[item][0])
    steps = shapes[longest][0]
    length = recipe.max_length or parameters.max_length or max(2 * steps, 4)
    if steps > length:
        raise ValueError(f"max_length: {length:,} steps, but the series of {dataset.place(longest)} has {steps:,}")
    spec = _complete(origin.spec, task, channels=channels, max_length=length)
    return Reading(spec=spec, input=SeriesInput(channels=channels, max_length=length))


def _read_words(
    origin: Origin,
    parameters: catalog.SequenceParameters | catalog.TransformerParameters,
    recipe: Recipe,
    dataset: Dataset,
    learned: np.ndarray,
    task: Task,
) -> Reading:
    """With the vocabulary of the published model, or one that is learned now."""
    length = recipe.max_length or parameters.max_length or TEXT_LENGTH
    template = None
    if origin.folder is not None and origin.manifest is not None and isinstance(origin.manifest.input, TextInput):
        input = msgspec.structs.replace(origin.manifest.input, max_length=length)
        tokenizer = (origin.folder / input.tokenizer).read_bytes()
        if origin.manifest.generation is not None and origin.manifest.generation.chat_template is not None:
            template = (origin.folder / origin.manifest.generation.chat_template).read_text()
    else:
        input = TextInput(max_length=length, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
        words = (text for item in learned for text in texts_of(dataset.content(int(item))))
        tokenizer = train_tokenizer(
            words, parameters.vocabulary_size, more=(START,) if default_template(dataset) else ()
        )
    spec = _complete(origin.spec, task, vocabulary=tokens_of(tokenizer), max_length=length)
    generation = None
    if isinstance(task, LanguageModel):
        assert input.eos_token_id is not None, "a vocabulary that is learned has an end"
        generation = Generation(context=length, end_token_ids=[input.eos_token_id])
    return Reading(
        spec=spec,
        input=input,
        tokenizer=tokenizer,
        generation=generation,
        chat_template=template or default_template(dataset),
    )


def _read_pairs(
    origin: Origin,
    parameters: catalog.TranslationParameters,
    recipe: Recipe,
    dataset: Dataset,
    learned: np.ndarray,
    task: Task,
) -> Reading:
    """With both vocabularies of the published model, or with two that are learned now."""
    length = recipe.max_length or parameters.max_length or TEXT_LENGTH
    if origin.folder is not None and origin.manifest is not None and isinstance(origin.manifest.input, TextInput):
        assert origin.manifest.output_text is not None, "a published translation has one"
        source, target = origin.manifest.input, origin.manifest.output_text
        tokenizers = [(origin.folder / spec.tokenizer).read_bytes() for spec in (source, target)]
    else:
        source = TextInput(max_length=length, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
        target = msgspec.structs.replace(source, tokenizer=TARGET_TOKENIZER)
        texts = ((dataset.content(int(item)) for item in learned), dataset.targets[learned])
        tokenizers = [train_tokenizer(side, parameters.vocabulary_size) for side in texts]
    source, target = (msgspec.structs.replace(spec, max_length=length) for spec in (source, target))
    vocabularies = {"vocabulary": tokens_of(tokenizers[0]), "target_vocabulary": tokens_of(tokenizers[1])}
    return Reading(
        spec=_complete(origin.spec, task, **vocabularies, max_length=length),
        input=source,
        tokenizer=tokenizers[0],
        written=Written(target, tokenizers[1]),
    )


def _complete(spec: ModelSpec, task: Task, **hyperparameters: Any) -> ModelSpec:
    return msgspec.structs.replace(spec, hyperparameters={**spec.hyperparameters, **hyperparameters}, task=task)
