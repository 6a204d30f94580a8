"""GET /v1/models: what is served, and what can be fine-tuned."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
from litestar import get
from litestar.datastructures import State
from litestar.params import FromPath

from export import bundle
from export.bundle import DamagedBundle, Manifest
from finetune.admission import trainable
from server.errors import ApiError
from server.runtime.model import Model
from server.runtime.repository import Repository, UnknownModel
from server.settings import Settings

CLASSIFIERS = ("classification", "binary", "multi_label")


class ModelObject(msgspec.Struct, kw_only=True):
    """OpenAI's model object, and: `status` "served", "published" (not loaded) or "trainable"; `modality`, `task`,
    `version`, the number of `classes`, the held-out `metrics`, a `description`, and of a trainable one the `objectives`
    that it can learn by, the one first that it learns by when a recipe names none. max_model_len: of a served language
    model, most tokens of a prompt and its answer."""

    id: str
    created: int = 0
    owned_by: str = "espalier"
    status: str
    modality: str | None
    task: str | None = None
    version: int | None = None
    classes: int | None = None
    metrics: dict[str, float] = {}
    description: str = ""
    objectives: list[str] = []
    max_model_len: int | None = None
    object: str = "model"


class ModelDetails(ModelObject, kw_only=True):
    """One model with its whole manifest, None for one that was never published."""

    manifest: dict[str, Any] | None = None


class ModelList(msgspec.Struct, kw_only=True):
    data: list[ModelObject]
    object: str = "list"


def served(model: Model) -> ModelObject:
    found = published(model.manifest, "served")
    found.max_model_len = None if model.language is None else model.language.context
    return found


def published(manifest: Manifest, status: str) -> ModelObject:
    return ModelObject(
        id=manifest.name,
        created=int(manifest.created_at.timestamp()),
        status=status,
        modality=type(manifest.input).__struct_config__.tag,  # type: ignore[arg-type]
        task=manifest.task,
        version=manifest.version,
        classes=len(manifest.labels) if manifest.task in CLASSIFIERS else None,
        metrics=manifest.metrics,
        description=f"{manifest.model['architecture']}, from {manifest.lineage.base_model}",
    )


def listing(settings: Settings) -> list[ModelObject]:
    """The newest version of every published model, then what can be fine-tuned."""
    found: list[ModelObject] = []
    for name in bundle.names(settings.repository):
        newest = bundle.versions(settings.repository, name)[-1]
        with suppress(DamagedBundle):
            found.append(published(bundle.read_manifest(settings.repository / name / str(newest)), "published"))
    return found + trainables(settings)


def trainables(settings: Settings) -> list[ModelObject]:
    return [
        ModelObject(
            id=one.name,
            status="trainable",
            modality=one.modality,
            description=one.description,
            objectives=list(one.objectives),
        )
        for one in trainable(settings.backbones)
    ]


def current(state: State) -> list[ModelObject]:
    """What is served in this moment, then what can be fine-tuned."""
    repository: Repository = state.repository
    return [served(model) for _, model in sorted(repository.models.items())] + trainables(state.settings)


@get("/v1/models", sync_to_thread=False)
def list_models(state: State) -> ModelList:
    """Models that are served, and backbones and architectures that can be fine-tuned."""
    return ModelList(data=current(state))


@get("/v1/models/{model_id:path}", sync_to_thread=False)
def get_model(state: State, model_id: FromPath[str]) -> ModelDetails:
    """One model; a served one with its manifest: tensors, pre-processing, labels, metrics, parity, lineage."""
    wanted = model_id.lstrip("/")
    try:
        model: Model = state.repository.get(wanted)
    except UnknownModel as error:
        for one in trainables(state.settings):
            if one.id == wanted:
                return ModelDetails(**msgspec.structs.asdict(one))
        raise ApiError(404, str(error), param="model", code="model_not_found") from error
    return ModelDetails(**msgspec.structs.asdict(served(model)), manifest=msgspec.to_builtins(model.manifest))


handlers = [list_models, get_model]
