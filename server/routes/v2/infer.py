"""POST /v2/models/{model}[/versions/{version}]/infer: the Open Inference Protocol with Triton's extensions for binary
tensors, classification, and the scheduling parameters.

The body is JSON, or JSON and behind it the tensors in binary, Inference-Header-Content-Length saying where they begin;
where that is 0 the whole body is the one input. What arrives in binary is not copied before the session reads it, nor
what leaves after it.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np
from litestar import post
from litestar.params import FromPath
from litestar.types import ASGIApp, Receive, Scope, Send

from server import tensors
from server.errors import ApiError
from server.exchange import Body, Exchange, encoder, handle
from server.inference import Result, check_takes_tensors, results
from server.routes.v2.infer_request import (
    Asked,
    Framing,
    block_of,
    framing,
    nothing_but,
    read_binary,
    read_json,
    unpacked,
)
from server.routes.v2.models import MODEL, VERSION
from server.rows import INLINE_BYTES, on_thread
from server.runtime.model import Model

# Shapes of answers that are kept for one beginning of requests.
MOST_SHAPES = 64
NOTHING = memoryview(b"")


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


async def infer(exchange: Exchange) -> Body:
    """InferResponse as JSON, with the tensors that are wanted in binary behind it."""
    frame: Framing = exchange.head.options or framing(exchange.head)
    model = await exchange.find(frame.reference, None)
    check_takes_tensors(model)
    body = await exchange.buffer()
    if frame.packed:
        body = await on_thread(unpacked, body, frame.packed, exchange.settings.max_body_bytes)
    asked, rest = await read(body, frame.json_bytes, model)
    if asked.priority is not None:
        exchange.priority = asked.priority
    if asked.seconds is not None and asked.seconds < exchange.timeout:
        exchange.timeout = exchange.asked_timeout = asked.seconds
    if asked.slow or (len(body) - len(rest) > INLINE_BYTES and not isinstance(rest, np.ndarray)):
        block = await on_thread(block_of, asked, rest, model)
    else:
        block = block_of(asked, rest, model)
    arrays = await exchange.result(exchange.submit(model, block, asked.names, "inputs").future)
    start = time.perf_counter()
    answer = encoded(exchange, model, asked, results(model, asked.wanted, asked.names, arrays))
    model.encode_seconds.observe(time.perf_counter() - start)
    return answer


async def read(body: bytes | memoryview, json_bytes: int | None, model: Model) -> tuple[Asked, memoryview | np.ndarray]:
    """What is asked, and the tensors in binary behind the JSON, or the one of the JSON that has been read. json_bytes:
    None where all of it is JSON. Raises ApiError, BadInput."""
    if json_bytes is None:
        text = bytes(body)
        found = read_json(text, model) if len(text) <= INLINE_BYTES else await on_thread(read_json, text, model)
        return found[0], NOTHING if found[1] is None else found[1]
    if json_bytes == 0:
        return nothing_but(body, model)
    if json_bytes > len(body):
        raise ApiError(400, f"Inference-Header-Content-Length is {json_bytes:,}; the body has {len(body):,} bytes")
    text = bytes(body[:json_bytes])
    asked = read_binary(text, model) if len(text) <= INLINE_BYTES else await on_thread(read_binary, text, model)
    return asked, memoryview(body)[json_bytes:]


def encoded(exchange: Exchange, model: Model, asked: Asked, found: list[Result]) -> Body:
    """InferResponse, and behind it the buffers of the tensors that go in binary."""
    buffers = [tensors.to_buffer(one.data) for one in found if one.binary]
    if not buffers:
        return beginning(model, asked, found, [])
    keep = asked.answers is not None and all(one.binary and not isinstance(one.data, list) for one in found)
    shapes = tuple(tuple(one.shape) for one in found)
    text = asked.answers.get(shapes) if keep and asked.answers is not None else None
    if text is None:
        text = beginning(model, asked, found, [len(one) for one in buffers])
        if keep and asked.answers is not None and len(asked.answers) < MOST_SHAPES:
            asked.answers[shapes] = text
    exchange.answer_type = b"application/octet-stream"
    exchange.more_headers.append((b"inference-header-content-length", b"%d" % len(text)))
    return [text, *buffers]


def beginning(model: Model, asked: Asked, found: list[Result], sizes: list[int]) -> bytes:
    """InferResponse. sizes: in bytes, of the tensors that stand behind it. Raises BadInput."""
    listed, left = [], iter(sizes)
    for name, datatype, shape, data, binary in found:
        if binary:
            listed.append(OutputTensor(name, datatype, list(shape), BinarySize(next(left))))
        else:
            listed.append(OutputTensor(name, datatype, list(shape), None, tensors.to_json(name, data)))
    return encoder.encode(InferResponse(model.name, str(model.version), listed, asked.identity))


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
