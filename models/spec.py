"""ModelSpec: what a network is, as data. JSON in, JSON out, no torch.

A checkpoint is a ModelSpec and a safetensors file; together they rebuild the network anywhere. What a user leaves open
(`task=None`, missing hyper-parameters) is filled in from the data before training starts, so that the ModelSpec beside
a checkpoint is always complete.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
HeadName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]{1,32}$")]


class Classification(msgspec.Struct, frozen=True, tag="classification", tag_field="type", forbid_unknown_fields=True):
    """One of `classes` mutually exclusive classes: logits float32 [batch, classes], softmax outside the graph."""

    classes: Annotated[int, msgspec.Meta(ge=2)]


class Binary(msgspec.Struct, frozen=True, tag="binary", tag_field="type", forbid_unknown_fields=True):
    """One of two classes, by one sigmoid unit: logits float32 [batch, 1], of the second class."""


class MultiLabel(msgspec.Struct, frozen=True, tag="multi_label", tag_field="type", forbid_unknown_fields=True):
    """Any number of `labels` at once: logits float32 [batch, labels], a sigmoid each."""

    labels: Positive


class Regression(msgspec.Struct, frozen=True, tag="regression", tag_field="type", forbid_unknown_fields=True):
    """`targets` numbers: value float32 [batch, targets] in the data's units. spread: "gaussian" learns a deviation of
    each answer, too, float32 [batch, targets]."""

    targets: Positive
    spread: Literal["none", "gaussian"] = "none"


HeadTask = Classification | Binary | MultiLabel | Regression


class MultiTask(msgspec.Struct, frozen=True, tag="multi_task", tag_field="type", forbid_unknown_fields=True):
    """Several heads on one trunk: the outputs of head "age" are called value_age, logits_age, ..."""

    heads: dict[HeadName, HeadTask]


class Embedding(msgspec.Struct, frozen=True, tag="embedding", tag_field="type", forbid_unknown_fields=True):
    """No head: the answer is the trunk's feature vector, float32 [batch, width]."""


class Reconstruction(msgspec.Struct, frozen=True, tag="reconstruction", tag_field="type", forbid_unknown_fields=True):
    """The input again, through a code: reconstruction in the input's units, error float32 [batch], embedding."""


class Generation(msgspec.Struct, frozen=True, tag="generation", tag_field="type", forbid_unknown_fields=True):
    """Images from nothing: latent float32 [batch, latent] to image uint8 [batch, height, width, 3]."""


class Translation(msgspec.Struct, frozen=True, tag="translation", tag_field="type", forbid_unknown_fields=True):
    """A text from a text, token by token."""


class LanguageModel(msgspec.Struct, frozen=True, tag="language_model", tag_field="type", forbid_unknown_fields=True):
    """The next token of a text."""


class MaskedLanguageModel(
    msgspec.Struct, frozen=True, tag="masked_language_model", tag_field="type", forbid_unknown_fields=True
):
    """Tokens that were hidden: what an encoder is pre-trained by. Served as an embedding."""


Task = (
    Classification
    | Binary
    | MultiLabel
    | Regression
    | MultiTask
    | Embedding
    | Reconstruction
    | Generation
    | Translation
    | LanguageModel
    | MaskedLanguageModel
)


def tag(task: Task) -> str:
    """The task's name in JSON: "classification", ..."""
    return str(type(task).__struct_config__.tag)


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An architecture by name, its hyper-parameters, its task, and where its first weights come from.

    architecture: a name in `models.catalog`.
    hyperparameters: checked against the architecture's own Struct by `models.catalog.hyperparameters`.
    task: what the head answers; None means "from the training data".
    weights: None for random initial weights, else a backbone's name, a hub id or a folder (`models.backbones`).
        Says where training began; a finished checkpoint never needs it.
    """

    architecture: str
    hyperparameters: dict[str, Any] = {}
    task: Task | None = None
    weights: str | None = None
