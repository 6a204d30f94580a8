"""Tensors of the Open Inference Protocol: which ones a model has, and what a model takes made of those that a client
sends. No transport is known here; REST and gRPC both come through this file.

Beside the inputs of its graph a text model takes `text` and an image model `image`, BYTES [rows]: for clients that have
no tokenizer, or no wish to resize. A text or a series is as long as its attention_mask has ones, which are followed by
zeros and nothing else; without a mask it has no padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np

from export.bundle import DamagedBundle, Manifest, TensorSpec
from export.processing.images import decode_image
from export.processing.inputs import BadInput, ImageInput, SeriesInput, TextInput
from export.processing.text import TextProcessor

# Texts beyond this are refused before they are tokenized.
MOST_CHARACTERS = 1_000_000

# All but BYTES, whose elements have lengths of their own.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
NAMES = {str(dtype): name for name, dtype in DATATYPES.items()} | {"float": "FP32", "double": "FP64"}
# What JSON has for an element; nothing for FP16.
ELEMENTS: dict[str, type] = {"BOOL": bool, "BYTES": str, "FP32": float, "FP64": float}

# A float as msgpack has it: a byte that says so, and the number. The shortest way from a list to an array.
PACKED = np.dtype([("tag", "u1"), ("value", ">f8")])
pack = msgspec.msgpack.Encoder().encode


class Described(msgspec.Struct, frozen=True):
    """What a tensor must be: -1 in `shape` is a size from 1 on that the client chooses."""

    name: str
    datatype: str
    shape: list[int]


class Tensor(NamedTuple):
    """data: an array of the tensor's shape, which may be a view on what has been received; of BYTES its elements."""

    name: str
    data: np.ndarray | list[bytes]


@dataclass(frozen=True)
class Signature:
    """The tensors of one model. main: the input that holds what is read. alternative: that of BYTES, which stands for
    the inputs of the graph; None where there is none. optional: inputs that may be left out. labels: by output, what
    its columns are called, where they have names."""

    inputs: dict[str, Described]
    outputs: dict[str, Described]
    main: str
    alternative: str | None
    optional: frozenset[str]
    labels: dict[str, list[str]]


def signature(manifest: Manifest) -> Signature:
    """Raises DamagedBundle for a datatype that the protocol does not know."""
    inputs = {spec.name: _described(spec) for spec in manifest.inputs}
    optional = {"attention_mask"} & inputs.keys()
    if alternative := {TextInput: "text", ImageInput: "image"}.get(type(manifest.input)):
        inputs[alternative] = Described(alternative, "BYTES", [-1])
        optional.add(alternative)
    outputs = {spec.name: _described(spec) for spec in manifest.outputs}
    labels = {"logits": _columns(manifest.task, manifest.labels)} if "logits" in outputs else {}
    labels |= {f"logits_{name}": _columns(head.task, head.labels) for name, head in manifest.heads.items()}
    return Signature(inputs, outputs, manifest.inputs[0].name, alternative, frozenset(optional), labels)


def _columns(task: str, labels: list[str]) -> list[str]:
    """The one logit of a binary head is that of its second label."""
    return labels[1:] if task == "binary" else labels


def _described(spec: TensorSpec) -> Described:
    if spec.dtype not in NAMES:
        raise DamagedBundle(f"tensor {spec.name}: {spec.dtype!r} is no datatype; known: {', '.join(NAMES)}")
    return Described(spec.name, NAMES[spec.dtype], [size if isinstance(size, int) else -1 for size in spec.shape])


def check(name: str, datatype: str, shape: Sequence[int], known: Signature) -> None:
    """Look at what a client says of an input, before its data. Raises BadInput for an input that the model does not
    have, another datatype, and a shape that does not fit."""
    expected = known.inputs.get(name)
    if expected is None:
        raise BadInput(f"there is no input {name!r}; this model has {', '.join(known.inputs)}")
    if datatype != expected.datatype:
        raise BadInput(f"input {name!r} is {expected.datatype}, not {datatype}")
    wanted = expected.shape
    # Many clients put an axis of one behind the rows of BYTES.
    fits = len(shape) == len(wanted) or (datatype == "BYTES" and len(shape) == 2 and shape[1] == 1)
    if not fits or any(size != want and (want != -1 or size < 1) for size, want in zip(shape, wanted, strict=False)):
        raise BadInput(f"input {name!r} has shape {list(shape)}; it takes {wanted}, where -1 is any size from 1 on")


def from_buffer(name: str, datatype: str, shape: Sequence[int], content: bytes | memoryview) -> Tensor:
    """A tensor in its binary form: little-endian, row by row; in front of each element of BYTES its length in four
    bytes. No copies are made but of BYTES. Raises BadInput when the size is not that of the shape."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return Tensor(name, _elements(name, count, content))
    dtype = DATATYPES[datatype]
    if len(content) != count * dtype.itemsize:
        takes = f"{datatype} of shape {list(shape)} takes {count * dtype.itemsize:,}"
        raise BadInput(f"input {name!r} has {len(content):,} bytes; {takes}")
    return Tensor(name, np.frombuffer(content, dtype).reshape(shape))


def _elements(name: str, count: int, content: bytes | memoryview) -> list[bytes]:
    found, place, size = [], 0, len(content)
    while place + 4 <= size:
        start = place + 4
        place = start + int.from_bytes(content[place:start], "little")
        found.append(bytes(content[start:place]))
    if len(found) != count or place != size:
        raise BadInput(f"input {name!r}: {size:,} bytes are not {count} elements, each behind its length in four bytes")
    return found


def from_json(name: str, datatype: str, shape: Sequence[int], data: msgspec.Raw) -> Tensor:
    """A tensor as JSON: its elements in a list, row by row, or in lists in lists, as deep as the shape has axes. Raises
    BadInput for another count, other elements, and FP16, which JSON has no numbers for."""
    if datatype == "FP16":
        raise BadInput(f"input {name!r}: FP16 is sent in binary, with binary_data_size")
    depth = brackets(data)
    if depth not in (1, len(shape) or 1):
        raise BadInput(f"input {name!r}: `data` is one flat list, or lists as deep as the shape {list(shape)}")
    kind: Any = ELEMENTS.get(datatype, int)
    for _ in range(depth):
        kind = list[kind]
    try:
        values = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"input {name!r}: `data` has no {datatype} elements: {error}") from error
    if depth > 1:
        whole = len(values) == shape[0]
        for size in shape[1:]:
            whole = whole and all(len(part) == size for part in values)
            values = list(chain.from_iterable(values))
        if not whole:
            raise BadInput(f"input {name!r}: the lists in `data` are not of shape {list(shape)}")
    return from_values(name, datatype, shape, values)


def brackets(data: msgspec.Raw) -> int:
    """How many lists a JSON value begins with, one inside the other."""
    start = b"".join(bytes(memoryview(data)[:64]).split())
    return len(start) - len(start.lstrip(b"["))


def from_values(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
    """A tensor from its elements, row by row. Raises BadInput for another count, and for integers out of range."""
    count = math.prod(shape)
    if len(values) != count:
        raise BadInput(f"input {name!r}: `data` has {len(values):,} elements; shape {list(shape)} takes {count:,}")
    if datatype == "BYTES":
        return Tensor(name, [value.encode() if isinstance(value, str) else value for value in values])
    dtype = DATATYPES[datatype]
    try:
        if dtype.kind == "f" and isinstance(values, list):
            packed = pack(values)
            numbers = np.frombuffer(packed, PACKED, count, len(packed) - 9 * count)["value"]
            with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such
                return Tensor(name, numbers.astype(dtype).reshape(shape))
        return Tensor(name, np.array(values, dtype).reshape(shape))
    except OverflowError as error:
        raise BadInput(f"input {name!r}: {error}") from error


def named_by_size(content: bytes | memoryview, manifest: Manifest) -> tuple[str, list[int]]:
    """Input and shape of a request that is nothing but the bytes of one input: rows of what the graph takes, as many as
    there are; the steps of one series; one text or image file. Raises BadInput where they are no whole number."""
    spec = manifest.inputs[0]
    match manifest.input:
        case TextInput():
            return "text", [1]
        case SeriesInput(channels=channels):
            fixed = [channels]
        case _:
            fixed = [size for size in spec.shape[1:] if isinstance(size, int)]
    size = DATATYPES[NAMES[spec.dtype]].itemsize * math.prod(fixed)
    if len(content) % size == 0:
        rows = len(content) // size
        return spec.name, [1, rows, *fixed] if isinstance(manifest.input, SeriesInput) else [rows, *fixed]
    if isinstance(manifest.input, ImageInput):
        return "image", [1]
    raise BadInput(f"{len(content):,} bytes are no whole number of rows of {spec.name!r}, which take {size:,} each")


def block(
    tensors: Iterable[Tensor], manifest: Manifest, known: Signature, texts: TextProcessor | None
) -> np.ndarray | list[Any]:
    """What the model takes of one request: the array of its graph, or a list of token ids or of series.

    Raises BadInput for inputs that are missing, given twice or do not go together, and for values that would spoil the
    batch of others: numbers that are not finite, tokens that the vocabulary does not have.
    """
    given: dict[str, Any] = {}
    for name, data in tensors:
        if name in given:
            raise BadInput(f"input {name!r} is given twice")
        given[name] = data
    spec, main, alternative = manifest.input, known.main, known.alternative
    if alternative in given:
        if len(given) > 1:
            raise BadInput(f"input {alternative!r} stands for the other inputs: send it alone, or them")
        elements = given[alternative]
        if isinstance(spec, ImageInput):
            return np.stack([decode_image(element, spec) for element in elements])
        assert texts is not None, "a text model has a tokenizer"
        return texts.encode([_text(element, i) for i, element in enumerate(elements)])
    if (array := given.get(main)) is None:
        instead = f", or {alternative!r}" if alternative else ""
        raise BadInput(f"input {main!r} is missing{instead}: {known.inputs[main].datatype} {known.inputs[main].shape}")
    if isinstance(spec, TextInput):
        assert texts is not None, "a text model has a tokenizer"
        rows = _rows(given, array, spec.max_length)
        _check_vocabulary(rows, texts.tokenizer.get_vocab_size())
        return rows
    if isinstance(spec, SeriesInput):
        rows = _rows(given, array, spec.max_length)
        for i, row in enumerate(rows):
            _check_finite(f"{main!r}, row {i},", row)
        return rows
    if array.dtype.kind == "f":
        _check_finite(repr(main), array)
    found: np.ndarray = array
    return found


def _check_finite(name: str, array: np.ndarray) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        place = np.argwhere(~finite)[0].tolist()
        raise BadInput(
            f"input {name} is {array[tuple(place)]} at {place}; every number must be finite in {array.dtype}"
        )


def _text(element: bytes, place: int) -> str:
    try:
        text = element.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"text {place} is not UTF-8: byte {error.start} cannot be read") from error
    if len(text) > MOST_CHARACTERS:
        raise BadInput(f"text {place} has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read")
    return text


def _rows(given: Mapping[str, Any], array: np.ndarray, most: int) -> list[np.ndarray]:
    """The rows of texts or series without their padding, as views. Raises BadInput for a mask of another kind than
    ones, then zeros, and for rows longer than the model reads."""
    mask = given.get("attention_mask")
    if mask is None:
        lengths = [array.shape[1]] * len(array)
    else:
        if mask.shape != array.shape[:2]:
            raise BadInput(f"attention_mask has shape {list(mask.shape)}; it must be {list(array.shape[:2])}")
        counts = (mask == 1).sum(axis=1)
        wrong = (mask != (np.arange(mask.shape[1]) < counts[:, None])).any(axis=1) | (counts == 0)
        if wrong.any():
            row = int(wrong.argmax())
            raise BadInput(f"attention_mask, row {row}: ones and then zeros are read, one at least, and no other mask")
        lengths = counts.tolist()
    if max(lengths) > most:
        raise BadInput(f"a row has {max(lengths):,} steps; this model reads at most {most:,}")
    return [row[:length] for row, length in zip(array, lengths, strict=True)]


def _check_vocabulary(rows: Sequence[np.ndarray], known: int) -> None:
    """An unknown id would break the run of everybody in the batch; what is masked is read by nobody."""
    for i, row in enumerate(rows):
        if row.min() < 0 or row.max() >= known:
            raise BadInput(f"input_ids, row {i}: token ids run from 0 to {known - 1}")


def outputs_of(names: Sequence[str], known: Signature) -> tuple[str, ...]:
    """Those that are asked for, each once; all where none is named. Raises BadInput for one that the model lacks."""
    for name in names:
        if name not in known.outputs:
            raise BadInput(f"there is no output {name!r}; this model gives {', '.join(known.outputs)}")
    return tuple(dict.fromkeys(names)) or tuple(known.outputs)


def classes(name: str, scores: np.ndarray, k: int, labels: Sequence[str]) -> list[bytes]:
    """The classification extension: of each row the k highest scores as "score:index:label", without the label where a
    column has no name. scores: [rows, classes]. Gives [rows, min(k, classes)], row by row. Raises BadInput for k below
    1 and tensors that are no scores."""
    if k < 1:
        raise BadInput(f"output {name!r}: classification is {k}; it must be 1 or more")
    if scores.ndim != 2:
        raise BadInput(f"output {name!r} has {scores.ndim} axes; classification takes rows of scores")
    found = []
    for row in scores:
        for i in (-row.astype(np.float64)).argsort(kind="stable")[:k].tolist():
            label = f":{labels[i]}" if i < len(labels) else ""
            found.append(f"{row[i]:.6f}:{i}{label}".encode())
    return found


def to_buffer(data: np.ndarray | list[bytes]) -> memoryview | bytes:
    """A tensor in its binary form; no copy of an array."""
    if isinstance(data, list):
        return b"".join(part for element in data for part in (len(element).to_bytes(4, "little"), element))
    return np.ascontiguousarray(data).data.cast("B")


def to_json(name: str, data: np.ndarray | list[bytes]) -> list[Any]:
    """A tensor as the elements of a flat list. Raises BadInput for FP16."""
    if isinstance(data, list):
        return [element.decode() for element in data]
    if data.dtype == np.float16:
        raise BadInput(f"output {name!r} is FP16, which is answered in binary: ask for it with binary_data")
    found: list[Any] = data.ravel().tolist()
    return found
