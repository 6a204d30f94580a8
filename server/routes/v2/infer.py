"""POST /v2/models/{model}[/versions/{version}]/infer: the Open Inference Protocol with Triton's extensions for binary
tensors, classification, and the scheduling parameters.

The body is JSON, or JSON and behind it the tensors in binary, Inference-Header-Content-Length saying where they begin;
where that is 0 the whole body is the one input. What arrives in binary is not copied before the session reads it, nor
what leaves after it.
"""

from __future__ import annotations

import time
import zlib
from typing import Any, NamedTuple

import msgspec
from litestar import post
from litestar.params import FromPath
from litestar.types import ASGIApp, Receive, Scope, Send

from export.processing.inputs import BadInput
from server import tensors
from server.errors import ApiError
from server.exchange import Exchange, decode_json, encoder, handle, too_large
from server.inference import (
    Result,
    Wanted,
    check_alone,
    check_takes_tensors,
    no_shared_memory,
    priority,
    results,
    seconds,
)
from server.request_head import Head
from server.routes.v2.models import MODEL, VERSION
from server.rows import INLINE_BYTES, on_thread
from server.runtime.batcher import Block
from server.runtime.model import Model


class InputParameters(msgspec.Struct):
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
    parameters: InputParameters | None = None
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


class FloatTensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class FloatRequest(msgspec.Struct):
    """The most common of requests, which is decoded in one go."""

    inputs: list[FloatTensor]
    id: str | None = None
    parameters: RequestParameters | None = None
    outputs: list[RequestedOutput] = []


class BinarySize(msgspec.Struct):
    binary_data_size: int


class OutputTensor(msgspec.Struct, omit_defaults=True):
    """data: the elements, row by row; not where they stand in binary behind the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: BinarySize | None = None
    data: list[Any] | None = None


class InferResponse(msgspec.Struct, omit_defaults=True):
    """id: the client's own, where it sent one."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | None = None


decoder = msgspec.json.Decoder(InferRequest)
float_decoder = msgspec.json.Decoder(FloatRequest)

Answer = bytes | list[bytes | memoryview]


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


async def infer(exchange: Exchange) -> Answer:
    """InferResponse as JSON, with the tensors that are wanted in binary behind it."""
    frame: Framing = exchange.head.options or framing(exchange.head)
    model = await exchange.find(frame.reference, None)
    check_takes_tensors(model)
    body = await exchange.buffer()
    if frame.packed:
        body = await on_thread(unpacked, body, frame.packed, exchange.settings.max_body_bytes)
    head = len(body) if frame.json_bytes is None else frame.json_bytes
    request: InferRequest | FloatRequest
    if head > len(body):
        raise ApiError(400, f"Inference-Header-Content-Length is {head:,}; the body has {len(body):,} bytes")
    if not head:
        request, rest = nothing_but(body, model)
    else:
        rest = memoryview(body)[head:]
        text = bytes(body) if frame.json_bytes is None else memoryview(body)[:head]
        request = read(text) if head <= INLINE_BYTES else await on_thread(read, text)
    all_binary = False
    if (asked := request.parameters) is not None:
        check_alone(asked.sequence_id)
        all_binary = asked.binary_data_output
        if asked.priority:
            exchange.priority = priority(asked.priority)
        if (limit := seconds(asked.timeout)) is not None and limit < exchange.timeout:
            exchange.timeout = exchange.asked_timeout = limit
    wanted = [output(one, all_binary) for one in request.outputs]
    names = tensors.outputs_of([one.name for one in wanted], model.signature)
    if not wanted:
        wanted = [Wanted(name, binary=all_binary) for name in names]
    if head <= INLINE_BYTES and not any(one.datatype == "BYTES" for one in request.inputs):
        block = block_of(request, rest, model)
    else:
        block = await on_thread(block_of, request, rest, model)
    arrays = await exchange.result(exchange.submit(model, block, names, "inputs").future)
    start = time.perf_counter()
    answer = encoded(exchange, model, request.id, results(model, wanted, names, arrays))
    model.encode_seconds.observe(time.perf_counter() - start)
    return answer


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


def nothing_but(body: bytes | memoryview, model: Model) -> tuple[InferRequest, memoryview]:
    """The request that a body stands for which is one input in binary; all outputs are answered so, too."""
    name, shape = tensors.named_by_size(body, model.manifest)
    datatype = model.signature.inputs[name].datatype
    content = b"".join([len(body).to_bytes(4, "little"), body]) if datatype == "BYTES" else body
    only = InputTensor(name, shape, datatype, InputParameters(len(content)))
    return InferRequest([only], parameters=RequestParameters(binary_data_output=True)), memoryview(content)


def read(text: bytes | memoryview) -> InferRequest | FloatRequest:
    """Raises ApiError 400."""
    # In a body without binary tensors these are most likely all that it has.
    if isinstance(text, bytes) and b'"FP32"' in text:
        try:
            found: FloatRequest = float_decoder.decode(text)
        except msgspec.DecodeError:
            pass  # it has other tensors, too, or lists in lists
        else:
            if all(one.datatype == "FP32" for one in found.inputs):
                return found
    request: InferRequest = decode_json(text, decoder)
    return request


def output(asked: RequestedOutput, binary: bool) -> Wanted:
    """binary: where the output itself does not say. Raises ApiError 400."""
    if (of := asked.parameters) is None:
        return Wanted(asked.name, binary=binary)
    if of.shared_memory_region is not None:
        raise no_shared_memory()
    return Wanted(asked.name, of.classification, binary if of.binary_data is None else of.binary_data)


def block_of(request: InferRequest | FloatRequest, rest: memoryview, model: Model) -> Block:
    """rest: what stands behind the JSON. Raises ApiError, BadInput."""
    known = model.signature
    found = []
    for one in request.inputs:
        tensors.check(one.name, one.datatype, one.shape, known)
        if isinstance(one, FloatTensor):
            found.append(tensors.from_values(one.name, one.datatype, one.shape, one.data))
            continue
        of = one.parameters or NONE
        if of.shared_memory_region is not None:
            raise no_shared_memory()
        if (size := of.binary_data_size) is None:
            if not memoryview(one.data):
                raise BadInput(f"input {one.name!r} has neither `data` nor binary_data_size")
            found.append(tensors.from_json(one.name, one.datatype, one.shape, one.data))
            continue
        if not 0 <= size <= len(rest):
            raise BadInput(f"input {one.name!r}: binary_data_size is {size:,}, and {len(rest):,} bytes are left")
        found.append(tensors.from_buffer(one.name, one.datatype, one.shape, rest[:size]))
        rest = rest[size:]
    if len(rest):
        raise BadInput(f"{len(rest):,} bytes at the end of the body belong to no input")
    return tensors.block(found, model.manifest, known, model.texts)


def encoded(exchange: Exchange, model: Model, identity: str | None, found: list[Result]) -> Answer:
    """InferResponse, and behind it the buffers of the tensors that go in binary."""
    listed: list[OutputTensor] = []
    parts: list[bytes | memoryview] = [b""]
    for name, datatype, shape, data, binary in found:
        if binary:
            content = tensors.to_buffer(data)
            parts.append(content)
            listed.append(OutputTensor(name, datatype, list(shape), BinarySize(len(content))))
        else:
            listed.append(OutputTensor(name, datatype, list(shape), None, tensors.to_json(name, data)))
    text = encoder.encode(InferResponse(model.name, str(model.version), listed, identity))
    if len(parts) == 1:
        return text
    parts[0] = text
    exchange.answer_type = b"application/octet-stream"
    exchange.more_headers.append((b"inference-header-content-length", str(len(text)).encode()))
    return parts


NONE = InputParameters()


async def infer_app(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v2/infer", scope, receive, send, infer)


# Litestar's bare ASGI handlers take no parameters in their paths, but a typed one may answer with an application.
@post(f"{MODEL}/infer", status_code=200)
async def infer_model(model: FromPath[str]) -> ASGIApp:
    """Asks a model for its tensors."""
    return infer_app


@post(f"{VERSION}/infer", status_code=200)
async def infer_version(model: FromPath[str], version: FromPath[str]) -> ASGIApp:
    return infer_app


handlers = [infer_model, infer_version]
