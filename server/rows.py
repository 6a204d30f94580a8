"""From the body of a request to rows that enter a graph. The body may be

- JSON: {"model", "input", ...}; `input` is a text, a vector of numbers, a series (a list of steps, each a list of
  numbers, or with one channel a list of numbers), an image as a data URL, or a list of those;
- multipart/form-data: the fields of the JSON body, one or more files;
- the raw bytes of one input, with the other fields in the address: an image (image/*), a text (text/plain), or for
  application/octet-stream what the graph takes: float32 numbers of one or more vectors, or of one series step by
  step, uint8 pixels of one or more images of exactly the model's size, or else an image file.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from export.processing.images import decode_image
from export.processing.inputs import BadInput, ImageInput, SeriesInput, TextInput, VectorInput
from export.processing.series import series
from export.processing.vectors import vector, vectors
from server.cut_numbers import cut, one_vector
from server.errors import ApiError
from server.exchange import Exchange, decode_json
from server.runtime.batcher import Block
from server.runtime.model import Model
from server.tensors import brackets
from server.upload import UploadForm

MOST_CHARACTERS = 1_000_000
# A JSON body up to this size is decoded on the event loop: handing it to a thread would cost more.
INLINE_BYTES = 64 * 1024

decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")

# The rows of a request as a model takes them, and the tokens in them.
Rows = tuple[Block, int]


class Request(Protocol):
    """What the JSON body of every such route has. `input` stays raw until the model is known: what it may be depends
    on it."""

    model: str
    input: msgspec.Raw


R = TypeVar("R", bound=Request)
T = TypeVar("T")


async def read_request(exchange: Exchange, decoder: msgspec.json.Decoder[R], answer: str) -> tuple[Model, Rows, R]:
    """The model, the rows with the tokens in them, and the request with all its options, whichever form it has."""
    head = exchange.head
    if head.kind in ("application/json", ""):
        return await read_json(exchange, decoder, answer)
    if head.kind == "multipart/form-data":
        contents, fields = await read_form(exchange)
        request = options({**head.fields(), **fields}, decoder.type)
        model = await exchange.find(request.model, answer)
        return model, await on_thread(file_rows, model, contents), request
    if head.options is None:
        head.options = options(head.fields(), decoder.type)
    model = await exchange.find(head.options.model, answer)
    body = await exchange.buffer()
    if head.kind == "application/octet-stream" and len(body) <= INLINE_BYTES:
        return model, raw_rows(model, head.kind, body), head.options
    return model, await off_loop(len(body), model, raw_rows, model, head.kind, body), head.options


async def read_json(exchange: Exchange, decoder: msgspec.json.Decoder[R], answer: str) -> tuple[Model, Rows, R]:
    """As `read_request`, of a JSON body."""
    body = await exchange.body()
    model: Model | None = None
    if len(body) <= INLINE_BYTES and (parts := cut(body, decoder.type)) is not None:
        rest, numbers = parts
        model = await exchange.find(rest.model, answer)
        if isinstance(spec := model.reads, VectorInput) and (block := one_vector(numbers, spec)) is not None:
            return model, (block, 0), rest
    request = decode_json(body, decoder)
    if model is None:
        model = await exchange.find(request.model, answer)
    return model, await off_loop(len(body), model, json_rows, model, request.input), request


def options(fields: Mapping[str, str], kind: type[R]) -> R:
    """The request that form fields or the address describe. Raises ApiError naming the one that is wrong."""
    names = set(kind.__struct_fields__) - {"input"}  # type: ignore[attr-defined]  # a msgspec Struct has it
    given = {name: value for name, value in fields.items() if name in names}
    for name in given:
        try:
            msgspec.convert({"model": "", "input": msgspec.Raw(b"null"), name: given[name]}, kind, strict=False)
        except msgspec.ValidationError as error:
            raise ApiError(400, f"{name}: {given[name]!r}: {error}", param=name) from error
    return msgspec.convert({"model": "", "input": msgspec.Raw(b"null"), **given}, kind, strict=False)


async def off_loop(size: int, model: Model, function: Callable[..., Rows], *arguments: Any) -> Rows:
    """Call `function`, on a thread when it is likely to take longer than the hop: images, texts, large bodies."""
    if size <= INLINE_BYTES and isinstance(model.reads, VectorInput | SeriesInput):
        return function(*arguments)
    return await on_thread(function, *arguments)


async def on_thread(function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(decoders, function, *arguments)


def json_rows(model: Model, raw: msgspec.Raw) -> Rows:
    """Graph rows from the `input` of a JSON body, and the tokens in them. Raises ApiError, BadInput."""
    spec = model.reads
    if isinstance(spec, VectorInput):
        many = nested(raw)
        values = decode_input(raw, list[list[float]] if many else list[float], "a list of numbers")
        return vectors(values if many else [values], spec), 0
    if isinstance(spec, SeriesInput):
        return series_rows(spec, raw), 0
    if isinstance(spec, TextInput) and bytes(raw).lstrip()[:1] == b"[" and not has_strings(raw):
        return token_rows(model, raw)
    found = decode_input(raw, str | list[str], "a string or a list of strings")
    items = [found] if isinstance(found, str) else found
    if not items:
        raise ApiError(400, "input: an empty list", param="input")
    if isinstance(spec, TextInput):
        return text_rows(model, items)
    return stacked([decode_image(data_url(item, i), spec) for i, item in enumerate(items)]), 0


def series_rows(spec: SeriesInput, raw: msgspec.Raw) -> list[np.ndarray]:
    """With one channel a list of lists is a list of series, as it is for vectors; with more, it is one series."""
    depth = min(max(brackets(raw), 1), 4)
    kind: Any = float
    for _ in range(depth):
        kind = list[kind]
    values = decode_input(raw, kind, "a list of steps, each a list of numbers, or a list of such series")
    if depth <= (1 if spec.channels == 1 else 2):
        return [series(values, spec)]
    rows = []
    for i, one in enumerate(values):
        try:
            rows.append(series(one, spec))
        except BadInput as error:
            raise BadInput(f"input {i}: {error}") from error
    return rows


def text_rows(model: Model, texts: Sequence[str]) -> Rows:
    assert model.texts is not None, "a text model has a tokenizer"
    for i, text in enumerate(texts):
        if len(text) > MOST_CHARACTERS:
            message = f"input {i} has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read"
            raise ApiError(413, message, param="input", code="text_too_long")
    rows = model.texts.encode(texts)
    return rows, sum(map(len, rows))


def token_rows(model: Model, raw: msgspec.Raw) -> Rows:
    """OpenAI lets clients send token ids; an unknown id would break the run of everybody in the batch."""
    spec = model.reads
    assert isinstance(spec, TextInput)
    assert model.texts is not None, "a text model has a tokenizer"
    kind: Any = list[list[int]] if nested(raw) else list[int]
    found = decode_input(raw, kind, "texts or lists of token ids")
    rows: list[list[int]] = found if nested(raw) else [found]
    known = model.texts.tokenizer.get_vocab_size()
    for row in rows:
        if not row or len(row) > spec.max_length:
            raise ApiError(400, f"input: {len(row)} token ids; 1 to {spec.max_length} are taken", param="input")
        if min(row) < 0 or max(row) >= known:
            raise ApiError(400, f"input: token ids run from 0 to {known - 1}", param="input")
    return rows, sum(map(len, rows))


def file_rows(model: Model, contents: Sequence[bytes]) -> Rows:
    """Graph rows of uploaded files: images, UTF-8 texts, float32 vectors or series."""
    spec = model.reads
    if isinstance(spec, ImageInput):
        return stacked([decode_image(content, spec) for content in contents]), 0
    if isinstance(spec, TextInput):
        return text_rows(model, [utf8(content) for content in contents])
    if isinstance(spec, SeriesInput):
        return [series(content, spec) for content in contents], 0
    return stacked([vector(content, spec) for content in contents]), 0


def raw_rows(model: Model, kind: str, body: bytes | memoryview) -> Rows:
    """Graph rows of a raw body: views on it, where it has what the graph takes."""
    spec = model.reads
    if isinstance(spec, TextInput):
        if kind != "text/plain":
            raise ApiError(415, f"{model.name} reads text: send JSON, or text/plain instead of {kind}")
        return text_rows(model, [utf8(bytes(body))])
    if isinstance(spec, VectorInput):
        size = 4 * spec.features
        if kind != "application/octet-stream" or len(body) % size:
            takes = f"{model.name} reads vectors of {spec.features} float32 numbers ({size} bytes)"
            raise ApiError(400, f"{takes} as application/octet-stream; the body has {len(body)} bytes of {kind}")
        return vectors(body, spec), 0
    if isinstance(spec, SeriesInput):
        if kind != "application/octet-stream":
            takes = f"{model.name} reads series of {spec.channels} float32 numbers a step"
            raise ApiError(415, f"{takes}: send them as application/octet-stream or in JSON, not as {kind}")
        return [series(bytes(body), spec)], 0
    shape = (spec.height, spec.width, spec.channels)
    if kind == "application/octet-stream" and len(body) % (size := spec.height * spec.width * spec.channels) == 0:
        return np.frombuffer(body, np.uint8).reshape(-1, *shape), 0
    if kind != "application/octet-stream" and not kind.startswith("image/"):
        raise ApiError(
            415, f"{model.name} reads images: send image/*, application/octet-stream, a form or JSON, not {kind}"
        )
    return decode_image(bytes(body), spec)[None], 0


def stacked(rows: list[np.ndarray]) -> np.ndarray:
    """[rows, …]; one row is not copied."""
    return rows[0][None] if len(rows) == 1 else np.stack(rows)


async def read_form(exchange: Exchange) -> tuple[list[bytes], dict[str, str]]:
    """The files and the fields of a form."""
    form = UploadForm(exchange.head.content_type, exchange.chunks())
    contents: list[bytes] = []
    while await form.next_file() is not None:
        contents.append(b"".join([piece async for piece in form.content()]))
    if not contents:
        raise ApiError(400, "the form has no file; send each input as a file", param="file")
    return contents, form.fields


def decode_input(raw: msgspec.Raw, kind: Any, words: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"input: expected {words}: {error}", param="input") from error


def nested(raw: msgspec.Raw) -> bool:
    """Whether a JSON value is a list of lists."""
    return brackets(raw) > 1


def has_strings(raw: msgspec.Raw) -> bool:
    return b'"' in bytes(raw) or bytes(raw).strip() == b"[]"


def data_url(text: str, place: int) -> bytes:
    """The bytes in "data:image/png;base64,…". Raises BadInput."""
    head, comma, body = text.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise BadInput(f"input {place}: an image in JSON is a data URL, data:image/png;base64,…")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"input {place}: not base64: {error}") from error


def utf8(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"the text is not UTF-8: byte {error.start} cannot be read") from error
