"""Settings: one Struct, filled from flags, ESPALIER_* variables and a TOML file, the first of them that says something.

A field is declared once, here; its flag, its variable, its key in the file and its line in `espalier config` follow.
"""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

PREFIX = "ESPALIER_"
FILE_VARIABLE = "ESPALIER_CONFIG"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the operator decides. Sizes are bytes, times seconds. `database` and `repository` follow `home` if empty."""

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    frontends: Annotated[
        int,
        Meta(ge=0, le=64, description="processes that do HTTP for the one that runs the models; 0: it does its own"),
    ] = 0
    grpc_port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Meta(description="port of the inference protocol over gRPC; 0 takes a free one, none: not offered"),
    ] = None
    home: Annotated[Path, Meta(description="folder of everything the server keeps")] = Path("espalier-data")
    database: Annotated[str, Meta(description="SQLAlchemy URL of the job store; empty: SQLite in home")] = ""
    repository: Annotated[Path, Meta(description="folder of published models; empty: home/repository")] = Path()
    repository_url: Annotated[
        str, Meta(description="object storage that the folder mirrors: s3://bucket/models, gs://, az://; empty: none")
    ] = ""
    backbones: Annotated[dict[str, str], Meta(description="more backbones: name=folder or hub id, comma between")] = {}
    allow_hub: Annotated[bool, Meta(description="let jobs name any model of the Hugging Face hub")] = False
    providers: Annotated[list[str], Meta(description="ONNX Runtime providers; empty: CUDA if there, then CPU")] = []
    parallel_runs: Annotated[int, Meta(ge=0, description="batches a model runs at once on a CPU; 0: by the cores")] = 0
    intra_op_threads: Annotated[int, Meta(ge=0, description="threads of one such run; 0: by the cores")] = 0
    generation_slots: Annotated[int, Meta(ge=1, description="sequences a language model writes at the same time")] = 16
    generation_context: Annotated[
        int, Meta(ge=0, description="tokens of a sequence, prompt and answer; 0: the model's own, at most 4096")
    ] = 0
    generation_tokens: Annotated[
        int, Meta(ge=0, description="tokens of all sequences in memory; 0: a quarter of the machine's")
    ] = 0
    queue_limit: Annotated[int, Meta(ge=1, description="waiting requests a model; more are told to come back")] = 1024
    queue_bytes: Annotated[int, Meta(ge=1, description="bytes of the inputs that wait for one model")] = 256 * 2**20
    request_seconds: Annotated[float, Meta(gt=0, description="an inference request older than this is dropped")] = 30.0
    max_upload_bytes: Annotated[int, Meta(ge=1, description="largest file that may be uploaded")] = 20 * 2**30
    max_body_bytes: Annotated[int, Meta(ge=1, description="largest body of every other request")] = 32 * 2**20
    lazy: Annotated[bool, Meta(description="load models when first asked for, where their deployment does not say")] = (
        False
    )
    model_memory_bytes: Annotated[
        int, Meta(ge=0, description="memory that models may take; lazy ones are evicted for it; 0: any")
    ] = 0
    poll_seconds: Annotated[float, Meta(gt=0, description="how often the repository is looked through")] = 1.0
    drain_seconds: Annotated[float, Meta(ge=0, description="how long a shutdown waits for open requests")] = 30.0
    slow_seconds: Annotated[
        float, Meta(ge=0, description="requests slower than this get a line in the log; 0: all do")
    ] = 5.0
    auth: Annotated[
        Literal["auto", "on", "off"],
        Meta(description="whether requests need an API key; auto: where others than this machine can reach the server"),
    ] = "auto"
    open_metrics: Annotated[bool, Meta(description="answer /metrics without a key where others need one")] = False
    otlp_endpoint: Annotated[
        str, Meta(description="OpenTelemetry collector (OTLP over HTTP) that traces are sent to; empty: none")
    ] = ""
    trace_share: Annotated[
        float, Meta(ge=0, le=1, description="share of requests that are traced, where no traceparent header says it")
    ] = 0.01
    worker: Annotated[bool, Meta(description="run fine-tuning jobs on this machine")] = True
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="least level logged")] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="one line of text, or of JSON, an event")] = "text"

    def __post_init__(self) -> None:
        if not self.database:
            msgspec.structs.force_setattr(self, "database", f"sqlite:///{self.home.resolve() / 'espalier.db'}")
        if self.repository == Path():
            msgspec.structs.force_setattr(self, "repository", self.home / "repository")


class SettingsError(ValueError):
    """A setting that cannot be; the message names the source, the field and what is expected."""


class Loaded(msgspec.Struct, frozen=True):
    """Settings, where each came from ("--port", "ESPALIER_PORT", "espalier.toml" or "default"), and the names of
    ESPALIER_* variables that mean nothing to us."""

    settings: Settings
    sources: dict[str, str]
    unknown: list[str]


FIELDS: dict[str, Any] = typing.get_type_hints(Settings, include_extras=True)


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def variable_of(field: str) -> str:
    return PREFIX + field.upper()


def load(flags: Mapping[str, Any], environ: Mapping[str, str], toml_path: Path | None = None) -> Loaded:
    """Settings from the command line (`flags`: field → value), the environment and a TOML file.

    Raises SettingsError for a file that cannot be read, an unknown key in it, and a value of the wrong type or range.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(FIELDS, "default")
    if toml_path is not None:
        for field, value in read_toml(toml_path).items():
            values[field], sources[field] = convert(field, value, f"{toml_path}: {field}"), str(toml_path)
    for field in FIELDS:
        variable = variable_of(field)
        if variable in environ:
            values[field], sources[field] = (
                convert(field, parse(field, environ[variable], variable), variable),
                variable,
            )
    for field, value in flags.items():
        flag = flag_of(field)
        values[field] = convert(field, parse(field, value, flag) if isinstance(value, str) else value, flag)
        sources[field] = flag
    known = {variable_of(field) for field in FIELDS} | {FILE_VARIABLE}
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    return Loaded(Settings(**values), sources, unknown)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not TOML: {error}") from error
    unknown = sorted(found.keys() - FIELDS.keys())
    if unknown:
        raise SettingsError(f"{path}: unknown setting {unknown[0]!r}; known: {', '.join(FIELDS)}")
    return found


def parse(field: str, text: str, source: str) -> Any:
    """A list ("a,b") or mapping ("a=x,b=y") written as one string; JSON is taken as well. Other fields stay strings."""
    kind = typing.get_origin(typing.get_args(FIELDS[field])[0])
    if kind not in (dict, list):
        return text
    if text.lstrip().startswith(("{", "[")):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise SettingsError(f"{source}: {error}") from error
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if kind is list:
        return parts
    pairs = [part.partition("=") for part in parts]
    wrong = [name for name, equals, value in pairs if not (name and equals and value)]
    if wrong:
        raise SettingsError(f"{source}: expected name=value pairs with commas between, got {text!r}")
    return {name.strip(): value.strip() for name, _, value in pairs}


def convert(field: str, value: Any, source: str) -> Any:
    if field == "repository" and "://" in str(value):
        raise SettingsError(f"{source}: a folder is expected, got {value!r}; object storage goes into repository_url")
    try:
        return msgspec.convert(value, FIELDS[field], strict=False, dec_hook=lambda kind, found: kind(found))
    except (msgspec.ValidationError, TypeError) as error:
        raise SettingsError(f"{source}: {error}, got {value!r}") from error
