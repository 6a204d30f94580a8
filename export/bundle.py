"""Bundle: what a server can load. One folder `<repository>/<name>/<version>/`, described by its manifest.json.

The manifest names every other file with its size and SHA-256; a folder that differs from it in one byte is refused.
Folders whose name starts with a dot are staging and never seen.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from export.processing.inputs import InputSpec, TextInput

FORMAT = 1
MANIFEST = "manifest.json"
CHAT_TEMPLATE = "chat_template.jinja"


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A graph input or output: `shape` holds sizes, or names for dynamic dimensions; `unit` says what a value means."""

    name: str
    dtype: str
    shape: list[int | str]
    unit: str


class GraphSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What goes into a graph and what comes out, in the graph's order."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """In a share `coverage` of all cases the truth i lies between value i - margin and value i + margin.

    gaussian: the margin is `margins[i]` deviations of the answer, which the network gives. conformal: it is
    `margins[i]` itself, in the data's units, for every answer; from what held-out items were missed by.
    """

    method: Literal["gaussian", "conformal"]
    coverage: float
    margins: list[float]


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """One of several heads: its task ("classification", "regression", ...) and what its outputs are called. interval:
    of its numbers, where it is known."""

    task: str
    labels: list[str]
    interval: Interval | None = None


class FileDigest(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """PyTorch against ONNX Runtime on the same samples; `batch_sizes` and `lengths` are those compared.

    largest_difference: absolute. tolerance: what was allowed, times an output's largest value where that is above 1.
    """

    samples: int
    largest_difference: float
    tolerance: float
    top1_disagreements: int
    batch_sizes: list[int]
    lengths: list[int] = []


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Where a bundle comes from. `recipe` is the Recipe as JSON data, None for an untouched backbone. unlabelled_sha256
    are of files of other domains, that the network was adapted to."""

    base_model: str
    job_id: str | None = None
    recipe: dict[str, Any] | None = None
    training_sha256: str | None = None
    validation_sha256: str | None = None
    unlabelled_sha256: list[str] = []
    package_versions: dict[str, str] = {}


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """How a language model writes. context: most tokens of a sequence, prompt and answer. end_token_ids: any of them
    ends a sequence. chat_template: the file of the Jinja template that chats are rendered by; None: it knows no chats.
    weights: how those of the graph's matrices are kept."""

    context: int
    end_token_ids: list[int]
    chat_template: str | None = None
    weights: Literal["float32", "float16", "int8", "int4"] = "float32"


Precision = Literal["float16", "bfloat16", "int8"]
Provider = Literal["cpu", "cuda"]


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """model.onnx in fewer bits, `model.<precision>.onnx`: takes and gives the same tensors. metrics: on held-out data.
    speeds: samples a second where it was exported, by provider."""

    precision: Precision
    metrics: dict[str, float]
    speeds: dict[Provider, float]


class Batching(msgspec.Struct, frozen=True, kw_only=True):
    max_batch_size: int = 64
    max_queue_delay_ms: float = 0.0


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a server must know.

    task: the tag of the ModelSpec's task. inputs, outputs: of model.onnx; graphs: of every other `<name>.onnx`.
    labels: labels[i] names logit i, or value i; of a binary model, logit 0 is that of labels[1]. interval: of the
    values, where it is known. heads: the same for each of several heads. output_text: the texts that a translation
    writes. generation: of a language model. variants: of model.onnx, each as good as was asked for. serving: the one
    that a provider is given, where that is not model.onnx itself. model: the complete ModelSpec as JSON data.
    """

    format: int = FORMAT
    name: str
    version: int
    created_at: datetime
    task: str
    input: InputSpec
    output_text: TextInput | None = None
    generation: Generation | None = None
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    graphs: dict[str, GraphSpec] = {}
    variants: list[Variant] = []
    serving: dict[Provider, Precision] = {}
    labels: list[str] = []
    interval: Interval | None = None
    heads: dict[str, Head] = {}
    model: dict[str, Any]
    metrics: dict[str, float] = {}
    parity: Parity
    lineage: Lineage
    batching: Batching = Batching()
    files: dict[str, FileDigest]


# Made once, while there is one thread: msgspec crashes where two threads are the first to learn a type.
manifest_decoder = msgspec.json.Decoder(Manifest)


class DamagedBundle(Exception):
    """A bundle that must not be served; the message names the file and what is wrong with it."""


def sha256_of(path: Path) -> FileDigest:
    """Digest of a file, read in pieces."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return FileDigest(digest.hexdigest(), path.stat().st_size)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle, its shape checked, its files not. Raises DamagedBundle."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedBundle(f"{path}: {error}") from error
    return decoded_manifest(content, str(path))


def decoded_manifest(content: bytes, source: str) -> Manifest:
    """Raises DamagedBundle, which begins with `source`."""
    try:
        manifest = manifest_decoder.decode(content)
    except msgspec.DecodeError as error:
        raise DamagedBundle(f"{source}: {error}") from error
    if manifest.format != FORMAT:
        raise DamagedBundle(f"{source}: format {manifest.format}, this server reads format {FORMAT}")
    return manifest


def verify(folder: Path) -> Manifest:
    """Read the manifest and check every file against it. Raises DamagedBundle naming the first that differs."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DamagedBundle(f"{path}: outside the bundle")
        if not path.is_file():
            raise DamagedBundle(f"{path}: missing")
        found = sha256_of(path)
        if found != expected:
            raise DamagedBundle(
                f"{path}: sha256 {found.sha256[:12]}…, {found.bytes} bytes; the manifest says "
                f"{expected.sha256[:12]}…, {expected.bytes} bytes"
            )
    for graph in ("model", *manifest.graphs, *(f"model.{one.precision}" for one in manifest.variants)):
        if f"{graph}.onnx" not in manifest.files:
            raise DamagedBundle(f"{folder / MANIFEST}: lists no {graph}.onnx")
        # The graph itself says that its weights are in there.
        if (weights := f"{graph}.onnx.data") not in manifest.files and (folder / weights).exists():
            raise DamagedBundle(f"{folder / MANIFEST}: lists no {weights}, and there is one")
    return manifest


def names(repository: Path) -> list[str]:
    """Names with at least one version, sorted."""
    if not repository.is_dir():
        return []
    return sorted(p.name for p in repository.iterdir() if not p.name.startswith(".") and versions(repository, p.name))


def versions(repository: Path, name: str) -> list[int]:
    """Published versions of a name, oldest first; empty when there are none."""
    folder = repository / name
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and (p / MANIFEST).is_file())
