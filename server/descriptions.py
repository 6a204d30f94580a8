"""How models are described in the terms of the Open Inference Protocol and of Triton: metadata, configuration,
statistics, the index of the repository. As REST sends them; gRPC's messages have the same fields.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import msgspec

from server.errors import ApiError
from server.histograms import Distribution
from server.inference import DEFAULT_LEVEL, PRIORITY_LEVELS
from server.metrics import Metrics
from server.runtime.deployment import All, Deployment, Named
from server.runtime.model import Model
from server.runtime.repository import NotLoaded, Repository, UnknownModel
from server.runtime.session import CPU
from server.tensors import Described

VERSION = "0.1.0"
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
EXTENSIONS = [
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "statistics",
]
REST_EXTENSIONS = sorted(["binary_tensor_data", *EXTENSIONS])


class ServerMetadata(msgspec.Struct):
    extensions: list[str]
    name: str = "espalier"
    version: str = VERSION


class Readiness(msgspec.Struct):
    """Of one model."""

    name: str
    ready: bool = True


class ModelMetadata(msgspec.Struct):
    """versions: those that are loaded; the tensors are of the one that was asked for. The BYTES input `text` or `image`
    stands for the other inputs; an attention_mask may be left out."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Described]
    outputs: list[Described]


class ConfigInput(msgspec.Struct):
    """dims: without the batch."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool


class ConfigOutput(msgspec.Struct):
    name: str
    data_type: str
    dims: list[int]


class LatestPolicy(msgspec.Struct):
    num_versions: int


class AllPolicy(msgspec.Struct):
    pass


class SpecificPolicy(msgspec.Struct):
    versions: list[int]


class VersionPolicy(msgspec.Struct, omit_defaults=True):
    """One of them."""

    latest: LatestPolicy | None = None
    all: AllPolicy | None = None
    specific: SpecificPolicy | None = None


class DynamicBatching(msgspec.Struct):
    preferred_batch_size: list[int]
    max_queue_delay_microseconds: int
    priority_levels: int = PRIORITY_LEVELS
    default_priority_level: int = DEFAULT_LEVEL


class InstanceGroup(msgspec.Struct):
    """kind: KIND_GPU or KIND_CPU. gpus: numbers of the devices; empty where they were not named."""

    name: str
    kind: str
    count: int
    gpus: list[int]


class Parameter(msgspec.Struct):
    string_value: str


class ResponseCache(msgspec.Struct):
    enable: bool


class ModelConfig(msgspec.Struct):
    """Triton's, as far as it applies here."""

    name: str
    version_policy: VersionPolicy
    max_batch_size: int
    input: list[ConfigInput]
    output: list[ConfigOutput]
    dynamic_batching: DynamicBatching
    instance_group: list[InstanceGroup]
    parameters: dict[str, Parameter]
    response_cache: ResponseCache
    platform: str = PLATFORM
    backend: str = BACKEND
    default_model_filename: str = "model.onnx"


class Duration(msgspec.Struct):
    """How often, and nanoseconds of all together."""

    count: int
    ns: int


class InferenceStats(msgspec.Struct):
    """Of requests. compute_input: reading them; compute_infer: the runs that they were in; compute_output: writing
    their answers; cache_hit, cache_miss: counted, and not timed."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStats(msgspec.Struct):
    """Of the runs of one size. What is measured of requests and not of runs is 0."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStats(msgspec.Struct):
    """Since the server started. last_inference: milliseconds since the epoch. inference_count: rows that were run.
    execution_count: runs."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStats
    batch_stats: list[BatchStats]


class Statistics(msgspec.Struct):
    model_stats: list[ModelStats]


class IndexEntry(msgspec.Struct):
    """state: READY, LOADING, UNLOADING or UNAVAILABLE."""

    name: str
    version: str
    state: str
    reason: str


def check_load(parameters: Collection[str]) -> None:
    """Raises ApiError 400: what a bundle says of itself cannot be replaced for a load."""
    if parameters:
        words = "a model is loaded as it was published; how it is served is said at /v1/models/{name}/deployment"
        raise ApiError(400, f"parameter {min(parameters)!r} is not taken: {words}", param=min(parameters))


async def find(
    repository: Repository, name: str, version: str = "", session: Callable[[], str | None] | None = None
) -> Model:
    """A model that is served, loaded now where that waits for the first who asks. session: tells the id of the session
    that a request is of, whose requests go to one version. Raises UnknownModel, CannotLoad."""
    reference = f"{name}:{version}" if version else name
    while True:  # what was loaded may be evicted before this goes on
        try:
            return repository.get(reference, session)
        except NotLoaded:
            await repository.load(reference)


def is_ready(repository: Repository, name: str, version: str = "") -> bool:
    """Whether requests may be sent to it: one that is loaded when it is asked for is ready, too."""
    try:
        repository.get(f"{name}:{version}" if version else name)
    except NotLoaded:
        return True
    except UnknownModel:
        return False
    return True


def model_metadata(model: Model, repository: Repository) -> ModelMetadata:
    loaded = [str(entry.version) for entry in repository.index() if entry.name == model.name and entry.state == "ready"]
    known = model.signature
    return ModelMetadata(model.name, loaded, PLATFORM, [*known.inputs.values()], [*known.outputs.values()])


def model_config(model: Model) -> ModelConfig:
    manifest, deployment, known = model.manifest, model.deployment, model.signature
    delay = deployment.max_queue_delay_ms
    delay = manifest.batching.max_queue_delay_ms if delay is None else delay
    on_gpu = model.provider != CPU
    return ModelConfig(
        name=model.name,
        version_policy=_policy(deployment),
        max_batch_size=deployment.max_batch_size or manifest.batching.max_batch_size,
        input=[
            ConfigInput(one.name, _data_type(one), one.shape[1:] or [1], one.name in known.optional)
            for one in known.inputs.values()
        ],
        output=[ConfigOutput(one.name, _data_type(one), one.shape[1:] or [1]) for one in known.outputs.values()],
        dynamic_batching=DynamicBatching(deployment.preferred_batch_sizes, round(delay * 1e3)),
        instance_group=[
            InstanceGroup(
                name=model.name,
                kind="KIND_GPU" if on_gpu else "KIND_CPU",
                count=deployment.instances or 1,
                gpus=deployment.devices if on_gpu else [],
            )
        ],
        parameters={"task": Parameter(manifest.task), "provider": Parameter(model.provider)},
        response_cache=ResponseCache(deployment.cache is not None),
    )


def _policy(deployment: Deployment) -> VersionPolicy:
    match deployment.versions:
        case All():
            return VersionPolicy(all=AllPolicy())
        case Named(versions=versions):
            return VersionPolicy(specific=SpecificPolicy(versions))
        case latest:
            return VersionPolicy(latest=LatestPolicy(latest.n))


def _data_type(tensor: Described) -> str:
    return "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"


def index(repository: Repository, ready: bool) -> list[IndexEntry]:
    """ready: leave out what cannot be asked."""
    return [
        IndexEntry(entry.name, str(entry.version), entry.state.upper(), entry.reason)
        for entry in repository.index()
        if entry.state == "ready" or not ready
    ]


def statistics(repository: Repository, metrics: Metrics, name: str = "", version: str = "") -> Statistics:
    """Of all loaded versions, or of those of one model, or of one. Raises UnknownModel where there is none."""
    found = [
        _statistics(entry.name, str(entry.version), metrics)
        for entry in repository.index()
        if entry.state == "ready" and name in ("", entry.name) and version in ("", str(entry.version))
    ]
    if name and not found:
        raise UnknownModel(f"no model {name!r}" + (f" with version {version!r}" if version else "") + " is loaded")
    return Statistics(found)


def _statistics(name: str, version: str, metrics: Metrics) -> ModelStats:
    runs = metrics.runs[name, version]
    none = Duration(0, 0)
    stages = {stage: _duration(metrics.stages.labels(name, version, stage)) for stage in ("decode", "queue", "encode")}
    return ModelStats(
        name=name,
        version=version,
        last_inference=round(runs.last * 1e3),
        inference_count=runs.rows,
        execution_count=sum(count for count, _ in runs.by_rows.values()),
        inference_stats=InferenceStats(
            success=_duration(metrics.latency.labels(name, version)),
            fail=_duration(metrics.failures.labels(name, version)),
            queue=stages["queue"],
            compute_input=stages["decode"],
            compute_infer=Duration(runs.requests, round(runs.request_seconds * 1e9)),
            compute_output=stages["encode"],
            cache_hit=Duration(runs.cached["hits"], 0),
            cache_miss=Duration(runs.cached["misses"], 0),
        ),
        batch_stats=[
            BatchStats(rows, none, Duration(count, round(seconds * 1e9)), none)
            for rows, (count, seconds) in sorted(runs.by_rows.items())
        ],
    )


def _duration(found: Distribution) -> Duration:
    return Duration(sum(found.counts), round(found.sum * 1e9))
