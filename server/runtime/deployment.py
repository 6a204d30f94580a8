"""How a model is served: which versions, under which aliases, with which share of the requests, on what, how batched.

One JSON file a model, `<repository>/<name>/deployment.json`; without it everything is by default. It is read whenever
the repository is looked through and replaced by one atomic rename, so a reader sees the old one or the new one, whole.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal
from uuid import uuid4

import msgspec
from msgspec import Meta

DEPLOYMENT = "deployment.json"
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")

Version = Annotated[int, Meta(ge=1)]
Rows = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0.0)]


class Latest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="latest", tag_field="policy"):
    """The newest `n` versions that load."""

    n: Annotated[int, Meta(ge=1)] = 1


class All(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="all", tag_field="policy"):
    """Every version there is."""


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="named", tag_field="policy"):
    """These versions and no others."""

    versions: Annotated[list[Version], Meta(min_length=1)]


class Shadow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A share of the requests is also asked of `version`, whose answers are compared and not sent."""

    version: Version
    share: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0


class Cache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answers are kept for so long, in so many bytes."""

    ttl_seconds: Seconds
    max_bytes: Annotated[int, Meta(ge=1)]


class Deployment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """versions: that are loaded, beside those which an alias, the traffic or the shadow name. aliases: "name@alias" is
    that version. traffic: shares of the requests to the bare name, by version; they need not sum to 1; empty: all to
    the newest. lazy: loaded when first asked for, and evicted where memory is needed; None as the server's settings
    say. max_batch_size,
    max_queue_delay_ms: None as the bundle says. preferred_batch_sizes: rows, that a batch is cut to where more wait.
    instances: sessions a device, devices: their numbers; 0 and empty: by itself. intra_op_threads: of one run, 0 by the
    cores. queue_limit: rows, request_seconds: None as the server's settings say. cache: None keeps no answers."""

    versions: Latest | All | Named = Latest()
    aliases: dict[str, Version] = {}
    traffic: dict[str, Annotated[float, Meta(ge=0.0)]] = {}
    shadow: Shadow | None = None
    lazy: bool | None = None
    max_batch_size: Rows | None = None
    max_queue_delay_ms: Annotated[float, Meta(ge=0.0)] | None = None
    preferred_batch_sizes: list[Rows] = []
    instances: Annotated[int, Meta(ge=0)] = 0
    devices: list[Annotated[int, Meta(ge=0)]] = []
    intra_op_threads: Annotated[int, Meta(ge=0)] = 0
    precision: Literal["auto", "float32", "float16", "bfloat16", "int8"] = "auto"
    tensorrt: bool = False
    cuda_graphs: bool = False
    queue_limit: Rows | None = None
    request_seconds: Seconds | None = None
    cache: Cache | None = None

    def run(self) -> Deployment:
        """What of it a loaded version is made by: when that is another, the version is loaded anew."""
        return msgspec.structs.replace(self, versions=Latest(), aliases={}, traffic={}, shadow=None, lazy=None)

    def referred(self) -> set[int]:
        """Versions that are served whatever the policy is."""
        shadow = set() if self.shadow is None else {self.shadow.version}
        return {*self.aliases.values(), *(int(version) for version in self.traffic), *shadow}

    def __post_init__(self) -> None:
        for alias in self.aliases:
            if not ALIAS.fullmatch(alias):
                raise ValueError(f"aliases: {alias!r}: letters, digits and ._- after a letter, at most 64")
        for version in self.traffic:
            if not (version.isascii() and version.isdecimal() and str(int(version)) == version and int(version) >= 1):
                raise ValueError(f'traffic: {version!r} is no version; shares go by version, as in {{"3": 0.9}}')
        if self.traffic and not 0.0 < sum(self.traffic.values()) < float("inf"):
            raise ValueError("traffic: no share above 0")
        if self.preferred_batch_sizes and self.max_batch_size is not None:
            largest = max(self.preferred_batch_sizes)
            if largest > self.max_batch_size:
                raise ValueError(f"preferred_batch_sizes: {largest} is above max_batch_size {self.max_batch_size}")


decoder = msgspec.json.Decoder(Deployment)  # made once, while there is one thread


class DeploymentError(ValueError):
    """A deployment that cannot be; the message names where it is from, the field and what is expected. field: of one
    that is well-formed and not for this model."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def decoded(content: bytes, source: str) -> Deployment:
    """Raises DeploymentError, which begins with `source`."""
    try:
        return decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DeploymentError(f"{source}: {error}") from error


def encoded(deployment: Deployment) -> bytes:
    """As JSON for people to read: the file's content."""
    return msgspec.json.format(msgspec.json.encode(deployment), indent=2) + b"\n"


def read(folder: Path) -> Deployment:
    """That of the model in `folder`; the default where there is no file. Raises DeploymentError."""
    path = folder / DEPLOYMENT
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Deployment()
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read: {error.strerror}") from error
    return decoded(content, str(path))


def write(folder: Path, deployment: Deployment) -> None:
    """Replace that of the model in `folder`, whole or not at all, so that it survives a power cut. Raises OSError."""
    staged = folder / f".{DEPLOYMENT}.{uuid4().hex}"
    try:
        with staged.open("wb") as stream:
            stream.write(encoded(deployment))
            stream.flush()
            os.fsync(stream.fileno())
        staged.rename(folder / DEPLOYMENT)
    finally:
        staged.unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
