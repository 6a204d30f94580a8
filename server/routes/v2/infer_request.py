"""What a request for inference says over REST, read as far as it can be known before the data of its tensors.

Clients that send their tensors in binary send the same JSON before them again and again. What has been made of it is
kept, and where the very same bytes begin another request to the same model, they are not read again.
"""

from __future__ import annotations

import math
import re
import zlib
from typing import NamedTuple

import msgspec
import numpy as np

from export.processing.inputs import BadInput
from server import tensors
from server.cut_numbers import IN_JSON, float32s
from server.errors import ApiError
from server.exchange import decode_json, too_large
from server.inference import Wanted, check_alone, no_shared_memory, priority, seconds
from server.request_head import Head
from server.runtime.batcher import Block
from server.runtime.model import Model
from server.tensors import Signature, Tensor

# Beginnings that are kept, and the longest of them in bytes.
MOST_KEPT = 1024
LONGEST_KEPT = 4096


class InputParameters(msgspec.Struct, frozen=True):
    """binary_data_size: of the tensor, in bytes, where it stands behind the JSON."""

    binary_data_size: int | None = None
    shared_memory_region: str | None = None


class OutputParameters(msgspec.Struct):
    """binary_data: whether this output is answered in binary. classification: answer so many of the best scores, as
    "score:index:label"."""

    binary_data: bool | None = None
    classification: int | None = None
    shared_memory_region: str | None = None


class RequestParameters(msgspec.Struct):
    """priority: from 1, the most urgent, to 7; 0 is 4. timeout: microseconds that the request may wait; 0: as long as
    the server lets it. binary_data_output: whether outputs that do not say otherwise are answered in binary."""

    priority: int = 0
    timeout: int = 0
    binary_data_output: bool = False
    sequence_id: int | str = 0


class InputTensor(msgspec.Struct):
    """data: the elements, in one list or in lists as the shape has axes."""

    name: str
    shape: list[int]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class RequestedOutput(msgspec.Struct):
    name: str
    parameters: OutputParameters | None = None


class InferRequest(msgspec.Struct):
    """outputs: those that are answered; all where none is named."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: RequestParameters | None = None
    outputs: list[RequestedOutput] = []


decoder = msgspec.json.Decoder(InferRequest)
# Where a list of numbers begins that is the `data` of a tensor, within so many bytes of a body.
BEGINS = re.compile(rb'"data"\s*:\s*(\[[\s\[]*[-0-9])')
SEARCHED_BYTES = 512


class Framing(NamedTuple):
    """What the head of a request says of its body. reference: of the model, as the repository has it. json_bytes: at
    the beginning; None: all of it. packed: how it is compressed."""

    reference: str
    json_bytes: int | None
    packed: bytes


def framing(head: Head) -> Framing:
    """Raises ApiError 400."""
    parts = head.path.split("/")
    json_bytes, packed = None, b""
    for name, value in head.headers:
        if name == b"inference-header-content-length":
            if not value.isdigit():
                raise ApiError(400, f"Inference-Header-Content-Length is {value.decode('latin-1')!r}; it is a number")
            json_bytes = int(value)
        elif name == b"content-encoding" and value != b"identity":
            packed = value
    found = Framing(parts[3] if len(parts) < 7 else f"{parts[3]}:{parts[5]}", json_bytes, packed)
    head.options = found
    return found


def unpacked(body: bytes | memoryview, packed: bytes, limit: int) -> bytes:
    """Raises ApiError 400, 413, 415."""
    if packed not in (b"gzip", b"deflate"):
        raise ApiError(415, f"Content-Encoding is {packed.decode('latin-1')!r}; gzip and deflate are read")
    inflater = zlib.decompressobj(wbits=47 if packed == b"gzip" else 15)
    try:
        found = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body cannot be unpacked: {error}") from error
    if len(found) > limit:
        raise too_large(limit)
    if not inflater.eof:
        raise ApiError(400, "the compressed body ends too soon")
    return found


class Asked:
    """A request but for the data of its tensors, which are checked to be the model's. priority: of the queue, None
    where the body does not say. seconds: it may wait, None likewise. slow: its decoding is for a thread. answers: what
    an answer begins with whose tensors are all in binary, by their shapes; None where this is not kept."""

    __slots__ = ("answers", "identity", "inputs", "known", "names", "priority", "seconds", "slow", "wanted")

    def __init__(self, request: InferRequest, known: Signature) -> None:
        """Raises ApiError, BadInput."""
        asked = request.parameters or NO_PARAMETERS
        check_alone(asked.sequence_id)
        self.known, self.identity, self.inputs = known, request.id, request.inputs
        self.priority = priority(asked.priority) if asked.priority else None
        self.seconds = seconds(asked.timeout)
        self.wanted = [_wanted(one, asked.binary_data_output) for one in request.outputs]
        self.names = tensors.outputs_of([one.name for one in self.wanted], known)
        if not self.wanted:
            self.wanted = [Wanted(name, binary=asked.binary_data_output) for name in self.names]
        self.slow = False
        for one in request.inputs:
            tensors.check(one.name, one.datatype, one.shape, known)
            self.slow = self.slow or one.datatype == "BYTES"
            if one.parameters.shared_memory_region is not None:
                raise no_shared_memory()
        self.answers: dict[tuple[tuple[int, ...], ...], bytes] | None = None


kept: dict[tuple[int, bytes], Asked] = {}


def read_binary(text: bytes, model: Model) -> Asked:
    """text: the JSON before tensors in binary. Raises ApiError, BadInput."""
    known = model.signature
    asked = kept.get((id(known), text))
    if asked is None:
        request: InferRequest = decode_json(text, decoder)
        asked = Asked(request, known)
        in_binary = all(one.parameters.binary_data_size is not None for one in request.inputs)
        if in_binary and request.id is None and len(text) <= LONGEST_KEPT:
            asked.answers = {}
            keep(text, asked)
    return asked


def keep(text: bytes, asked: Asked) -> None:
    if len(kept) >= MOST_KEPT:
        kept.clear()
    kept[id(asked.known), text] = asked  # which holds what is known, so that nothing else has that id


def read_json(text: bytes, model: Model) -> tuple[Asked, np.ndarray | None]:
    """text: the whole body. What is asked, and the one tensor of it where that has been read already. Raises ApiError,
    BadInput."""
    if (found := cut_floats(text, model)) is not None:
        return found
    request: InferRequest = decode_json(text, decoder)
    return Asked(request, model.signature), None


def cut_floats(text: bytes, model: Model) -> tuple[Asked, np.ndarray] | None:
    """The most common of requests, one input of FP32; None of every other, and of one that is wrong: it is read again
    to say how.

    Most of its text are the numbers. They are cut out and read without a Python object for each; what is around them
    is the same again and again, and kept.
    """
    begins = BEGINS.search(text, 0, SEARCHED_BYTES)
    if begins is None:
        return None
    # Neither a key nor the end of an object is in a list of numbers: what comes first of them is behind it.
    start, first = begins.span(1)
    stops = [stop for stop in (text.find(b'"', first), text.find(b"}", first)) if stop >= 0]
    end = text.rfind(b"]", start, min(stops, default=0)) + 1
    numbers, around = text[start:end], b"%b%b%b" % (text[:start], IN_JSON, text[end:])
    known = model.signature
    asked = kept.get((id(known), around))
    if asked is None:
        try:
            asked = Asked(decoder.decode(around), known)
        except (msgspec.DecodeError, UnicodeDecodeError, ApiError, BadInput):
            return None
        if len(asked.inputs) != 1 or (one := asked.inputs[0]).datatype != "FP32" or bytes(one.data) != IN_JSON:
            return None
        if one.parameters.binary_data_size is not None:
            return None
        if asked.identity is None and len(around) <= LONGEST_KEPT:
            asked.answers = {}
            keep(around, asked)
    shape = asked.inputs[0].shape
    depth = text.count(b"[", start, first)
    if depth > 1 and (depth != len(shape) or math.prod(shape[:-1]) != 1):
        return None  # several lists, of which each is looked at
    if numbers.find(b"[", first - start) >= 0:
        return None
    values = float32s(numbers)
    if values is None or len(values) != math.prod(shape):
        return None
    return asked, values.reshape(shape)


def nothing_but(body: bytes | memoryview, model: Model) -> tuple[Asked, memoryview]:
    """The request that a body stands for which is one input in binary, and that input; all outputs are answered so."""
    name, shape = tensors.named_by_size(body, model.manifest)
    datatype = model.signature.inputs[name].datatype
    content = b"".join([len(body).to_bytes(4, "little"), body]) if datatype == "BYTES" else body
    only = InputTensor(name, shape, datatype, InputParameters(len(content)))
    request = InferRequest([only], parameters=RequestParameters(binary_data_output=True))
    return Asked(request, model.signature), memoryview(content)


def _wanted(asked: RequestedOutput, binary: bool) -> Wanted:
    """binary: where the output itself does not say. Raises ApiError 400."""
    if (of := asked.parameters) is None:
        return Wanted(asked.name, binary=binary)
    if of.shared_memory_region is not None:
        raise no_shared_memory()
    return Wanted(asked.name, of.classification, binary if of.binary_data is None else of.binary_data)


def block_of(asked: Asked, rest: memoryview | np.ndarray, model: Model) -> Block:
    """rest: what stands behind the JSON, or the one tensor. Raises BadInput."""
    if isinstance(rest, np.ndarray):
        return tensors.block([Tensor(asked.inputs[0].name, rest)], model.manifest, asked.known, model.texts)
    found: list[Tensor] = []
    place = 0
    for one in asked.inputs:
        if (size := one.parameters.binary_data_size) is not None:
            if not 0 <= size <= len(rest) - place:
                left = len(rest) - place
                raise BadInput(f"input {one.name!r}: binary_data_size is {size:,}, and {left:,} bytes are left")
            found.append(tensors.from_buffer(one.name, one.datatype, one.shape, rest[place : place + size]))
            place += size
        elif memoryview(one.data):
            found.append(tensors.from_json(one.name, one.datatype, one.shape, one.data))
        else:
            raise BadInput(f"input {one.name!r} has neither `data` nor binary_data_size")
    if place != len(rest):
        raise BadInput(f"{len(rest) - place:,} bytes at the end of the body belong to no input")
    return tensors.block(found, model.manifest, asked.known, model.texts)


NO_PARAMETERS = RequestParameters()
