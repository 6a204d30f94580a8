"""GET /v1/models: what is served, and what can be fine-tuned."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
from litestar import get
from litestar.datastructures import State
from litestar.params import FromPath

from export.bundle import DamagedBundle, Manifest
from finetune.admission import trainable
from server.errors import ApiError
from server.runtime.deployment import DeploymentError
from server.runtime.repository import Repository, UnknownModel, bundles_of
from server.settings import Settings

CLASSIFIERS = ("classification", "binary", "multi_label")


class VersionObject(msgspec.Struct, kw_only=True):
    """A published version: `state` "ready", "loading", "unloading" or "unavailable", the last for a `reason`."""

    version: int
    state: str
    reason: str = ""


class ModelObject(msgspec.Struct, kw_only=True):
    """OpenAI's model object, and: `status` "served", "published" (not loaded) or "trainable"; `modality`, `task`,
    `version`, the number of `classes`, the held-out `metrics`, a `description`, and of a trainable one the `objectives`
    that it can learn by, the one first that it learns by when a recipe names none. max_model_len: of a served language
    model, most tokens of a prompt and its answer. versions: all that are published. aliases: the version that each
    means. traffic: shares of the requests to the bare name by version, empty where `version` gets all."""

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
    versions: list[VersionObject] = []
    aliases: dict[str, int] = {}
    traffic: dict[str, float] = {}
    object: str = "model"


class ModelDetails(ModelObject, kw_only=True):
    """One model with its whole manifest, None for one that was never published."""

    manifest: dict[str, Any] | None = None


class ModelList(msgspec.Struct, kw_only=True):
    data: list[ModelObject]
    object: str = "list"


async def described(repository: Repository, name: str, version: int) -> tuple[ModelObject, Manifest]:
    """A version that is served, or loaded when it is asked for. Raises DamagedBundle, OSError."""
    model = repository.ready[name].get(version)
    manifest = await repository.manifest(name, version)
    found = published(manifest, "published" if model is None else "served")
    if model is not None and model.language is not None:
        found.max_model_len = model.language.context
    if (view := repository.views.get(name)) is not None:
        found.aliases = dict(view.aliases)
        sums = [0.0, *(upto for upto, _ in view.split)]
        found.traffic = {str(one): sums[i + 1] - sums[i] for i, (_, one) in enumerate(view.split)}
    return found, manifest


def states(repository: Repository) -> dict[str, list[VersionObject]]:
    """The published versions by name."""
    found: dict[str, list[VersionObject]] = {}
    for entry in repository.index():
        one = VersionObject(version=entry.version, state=entry.state, reason=entry.reason)
        found.setdefault(entry.name, []).append(one)
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
    """The newest version of every published model, then what can be fine-tuned. Raises OSError."""
    found: list[ModelObject] = []
    bundles = bundles_of(settings)
    for name, there in sorted(
        bundles.look(()).items() if settings.repository.is_dir() or settings.repository_url else ()
    ):
        with suppress(DamagedBundle):
            one = published(bundles.manifest(name, max(there.versions)), "published")
            one.versions = [VersionObject(version=version, state="unavailable") for version in sorted(there.versions)]
            with suppress(DeploymentError):
                deployment = bundles.deployment(name)
                one.aliases = deployment.aliases
                total = sum(deployment.traffic.values())
                one.traffic = {version: weight / total for version, weight in deployment.traffic.items()}
            found.append(one)
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


async def current(state: State) -> list[ModelObject]:
    """What is served in this moment or loaded when it is asked for, then what can be fine-tuned."""
    repository: Repository = state.repository
    found, versions = [], states(repository)
    for name, view in sorted(repository.views.items()):
        with suppress(DamagedBundle, OSError, KeyError):  # removed just now
            if view.newest is not None:
                one, _ = await described(repository, name, view.newest)
                one.versions = versions.get(name, [])
                found.append(one)
    return found + trainables(state.settings)


@get("/v1/models")
async def list_models(state: State) -> ModelList:
    """Models that are served, and backbones and architectures that can be fine-tuned."""
    return ModelList(data=await current(state))


@get("/v1/models/{name:str}")
async def get_model(state: State, name: FromPath[str]) -> ModelDetails:
    """One model; a served one with its manifest: tensors, pre-processing, labels, metrics, parity, lineage."""
    return await details(state, name)


@get("/v1/models/{owner:str}/{name:str}")
async def get_owned_model(state: State, owner: FromPath[str], name: FromPath[str]) -> ModelDetails:
    """One that can be fine-tuned and is called as the hub calls it."""
    return await details(state, f"{owner}/{name}")


async def details(state: State, wanted: str) -> ModelDetails:
    repository: Repository = state.repository
    try:
        name, version = repository.resolve(wanted)
        if wanted == name:  # whatever the shares of the traffic are
            version = repository.views[name].newest or version
        found, manifest = await described(repository, name, version)
    except UnknownModel as error:
        for one in trainables(state.settings):
            if one.id == wanted:
                return ModelDetails(**msgspec.structs.asdict(one))
        raise ApiError(404, str(error), param="model", code="model_not_found") from error
    except (DamagedBundle, OSError) as error:
        raise ApiError(503, f"{wanted} is not loaded and cannot be read: {error}", param="model") from error
    found.versions = states(repository).get(name, [])
    return ModelDetails(**msgspec.structs.asdict(found), manifest=msgspec.to_builtins(manifest))


handlers = [list_models, get_model, get_owned_model]
