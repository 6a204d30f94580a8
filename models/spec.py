"""ModelSpec: what a network is, as data. JSON in, JSON out, no torch.

A checkpoint is a ModelSpec and a safetensors file; together they rebuild the network anywhere. What a user leaves open
(`task=None`, missing hyper-parameters) is filled in from the data before training starts, so that the ModelSpec beside
a checkpoint is always complete.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]


class Classification(msgspec.Struct, frozen=True, tag="classification", tag_field="type", forbid_unknown_fields=True):
    """One of `classes` mutually exclusive classes: logits float32 [batch, classes], softmax outside the graph."""

    classes: Annotated[int, msgspec.Meta(ge=2)]


class Embedding(msgspec.Struct, frozen=True, tag="embedding", tag_field="type", forbid_unknown_fields=True):
    """No head: the answer is the trunk's feature vector, float32 [batch, width]."""


Task = Classification | Embedding


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
