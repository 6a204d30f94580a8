"""POST /v1/classify and POST /v1/embeddings: bytes in, tensors through, JSON out.

These are bare ASGI handlers mounted in the Litestar application, for speed; everything else about them (errors,
OpenAPI, metrics) is as with the typed ones. The body may be

- JSON: {"model", "input", "top_k"}; `input` is a text, a vector of numbers, a series (a list of steps, each a list of
  numbers, or with one channel a list of numbers), an image as a data URL, or a list of those;
- multipart/form-data: fields `model` and `top_k`, one or more files;
- the raw bytes of one input with ?model=…&top_k=…: an image (image/*), a text (text/plain), or for
  application/octet-stream what the graph takes: float32 numbers of one or more vectors, or of one series step by
  step, uint8 pixels of one or more images of exactly the model's size, or else an image file.

X-Request-Timeout (seconds) drops a request that has waited longer with a 408.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal, cast
from urllib.parse import parse_qs

import msgspec
import numpy as np
from litestar import asgi
from litestar.types import HTTPDisconnectEvent, HTTPRequestEvent, HTTPScope, Receive, Scope, Send

from export.processing.answers import Prediction, normalize, top_k
from export.processing.images import decode_image
from export.processing.inputs import BadInput, ImageInput, SeriesInput, TextInput, VectorInput
from export.processing.series import series
from export.processing.vectors import vector
from server.errors import ApiError, request_id
from server.metrics import Metrics
from server.runtime.batcher import ClientGone, DeadlinePassed, QueueFull, RunFailed
from server.runtime.model import Model
from server.runtime.repository import Repository, UnknownModel
from server.settings import Settings
from server.upload import UploadForm

log = logging.getLogger("espalier.inference")

MOST_CHARACTERS = 1_000_000
# A JSON body up to this size is decoded on the event loop: handing it to a thread would cost more.
INLINE_BYTES = 64 * 1024
DEFAULT_TOP_K = 5

decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")


class ClassifyRequest(msgspec.Struct):
    """`input` stays raw until the model is known: what it may be depends on it."""

    model: str
    input: msgspec.Raw
    top_k: int = DEFAULT_TOP_K


class EmbeddingsRequest(msgspec.Struct):
    """OpenAI's embeddings request."""

    model: str
    input: msgspec.Raw
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class Classified(msgspec.Struct):
    """The answer for one input: the winning label, its probability, and the `top_k` best of all."""

    index: int
    label: str
    probability: float
    top: list[Prediction]


class Usage(msgspec.Struct):
    """`prompt_tokens`: tokens read, 0 where the input is no text."""

    prompt_tokens: int
    total_tokens: int


class ClassifyAnswer(msgspec.Struct):
    """`data` has one entry an input, in their order."""

    model: str
    version: int
    data: list[Classified]
    usage: Usage
    object: str = "list"


class EmbeddingItem(msgspec.Struct):
    """`embedding`: numbers, or their little-endian float32 bytes in base64; of unit length."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingsAnswer(msgspec.Struct):
    model: str
    data: list[EmbeddingItem]
    usage: Usage
    object: str = "list"


classify_decoder = msgspec.json.Decoder(ClassifyRequest)
embeddings_decoder = msgspec.json.Decoder(EmbeddingsRequest)
encoder = msgspec.json.Encoder()

Rows = tuple[list[Any], int]
Asked = tuple[Model, list[Any], int]


class Exchange:
    """One request: its scope, where its body comes from, and what has been seen of it."""

    def __init__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        state = scope["litestar_app"].state
        self.repository: Repository = state.repository
        self.metrics: Metrics = state.metrics
        self.settings: Settings = state.settings
        self.start = time.perf_counter()
        self.model: Model | None = None
        self.content_type = ""
        self.timeout = self.settings.request_seconds
        self.length: int | None = None
        self.received = 0

    def read_headers(self) -> None:
        """Raises ApiError 405 for another method than POST, 400 for a timeout that is none."""
        if self.scope["method"] != "POST":
            raise ApiError(405, f"{self.scope['method']} is not allowed here; use POST", headers={"allow": "POST"})
        for name, value in self.scope["headers"]:
            if name == b"content-type":
                self.content_type = value.decode("latin-1")
            elif name == b"x-request-timeout":
                self.timeout = min(self.timeout, seconds_of(value))
            elif name == b"content-length":
                self.length = int(value) if value.isdigit() else None

    async def piece(self) -> tuple[bytes, bool]:
        """The next part of the body, and whether more comes. Raises ApiError 413 beyond the limit, ClientGone."""
        limit = self.settings.max_body_bytes
        if self.length is not None and self.length > limit:
            raise too_large(limit)
        message = cast(HTTPRequestEvent | HTTPDisconnectEvent, await self.receive())
        if message["type"] == "http.disconnect":
            raise ClientGone
        self.received += len(message["body"])
        if self.received > limit:
            raise too_large(limit)
        return message["body"], message["more_body"]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises as `piece` does."""
        more = True
        while more:
            body, more = await self.piece()
            yield body

    async def body(self) -> bytes:
        """The whole body. Raises as `piece` does, and ApiError 400 when it is empty."""
        whole, more = await self.piece()
        if more:
            pieces = [whole]
            while more:
                body, more = await self.piece()
                pieces.append(body)
            whole = b"".join(pieces)
        if not whole:
            raise ApiError(400, "the body is empty; send JSON, a form or the bytes of an input")
        return whole

    @cached_property
    def parameters(self) -> dict[str, list[str]]:
        return parse_qs(self.scope["query_string"].decode("latin-1"))

    def query(self, name: str) -> str | None:
        found = self.parameters.get(name)
        return found[0] if found else None

    def gone(self) -> bool:
        """Whether the client has disconnected: `receive` is asked, and left again where it begins to wait."""
        asking = self.receive().__await__()
        try:
            next(asking)
        except StopIteration as answer:
            return bool(answer.value["type"] == "http.disconnect")
        asking.close()
        return False

    def find(self, reference: str | None, output: str) -> Model:
        """The model a request names. Raises ApiError 400 when it names none, 404 when it is not served."""
        if not reference:
            raise ApiError(400, "name a model: `model` in the body, or ?model=… beside a raw body", param="model")
        try:
            self.model = self.repository.get(reference)
        except UnknownModel as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error
        if output not in self.model.outputs:
            raise ApiError(400, f"{self.model.name} does not classify; ask it at /v1/embeddings", param="model")
        return self.model

    async def answers(self, model: Model, rows: list[Any], output: str) -> list[np.ndarray]:
        """Queue the rows and wait; the request is dropped when the client has gone before its turn comes."""
        model.decode_seconds.observe(time.perf_counter() - self.start)
        if len(rows) > self.settings.queue_limit:
            limit = self.settings.queue_limit
            raise ApiError(400, f"{len(rows)} inputs in one request; at most {limit} are taken", param="input")
        try:
            ticket = model.batcher.submit(rows, output, self.start + self.timeout, self.gone)
        except QueueFull as error:
            retry = {"retry-after": str(error.retry_after)}
            raise ApiError(
                429, f"{model.name} has no room in its queue; try again", code="queue_full", headers=retry
            ) from error
        try:
            return await ticket.future
        except DeadlinePassed as error:
            waited = f"the request waited {self.timeout:g} s, its deadline, and was dropped"
            raise ApiError(408, waited, code="deadline_exceeded") from error

    async def respond(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        pairs = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


async def handle(
    route: str, scope: Scope, receive: Receive, send: Send, answer: Callable[[Exchange], Awaitable[bytes]]
) -> None:
    """Run `answer`, and turn what goes wrong into OpenAI's error object."""
    exchange = Exchange(cast(HTTPScope, scope), receive, send)
    headers: dict[str, str] = {}
    try:
        exchange.read_headers()
        status, body = 200, await answer(exchange)
    except ApiError as error:
        status, body, headers = error.status, error.encoded(), error.headers
    except BadInput as error:
        status, body = 400, ApiError(400, str(error), param="input").encoded()
    except ClientGone:
        status, body = 499, b""
    except Exception as error:
        identity = request_id(scope)
        log.error("%s failed, request %s", route, identity, exc_info=error)
        what = "The model failed to run" if isinstance(error, RunFailed) else "The server failed to answer"
        message = f"{what}; the server's log has the cause under request id {identity}."
        status, body = 500, ApiError(500, message, code="internal_error").encoded()
    model = exchange.model
    exchange.metrics.requests[route, model.name if model else "", str(status)] += 1
    if status != 499:
        await exchange.respond(status, body, headers)
    if model is not None and status == 200:
        model.request_seconds.observe(time.perf_counter() - exchange.start)


async def classify(exchange: Exchange) -> bytes:
    """ClassifyAnswer as JSON."""
    model, (rows, tokens), k = await read_classify(exchange)
    if k < 1:
        raise ApiError(400, f"top_k is {k}; it must be 1 or more", param="top_k")
    found = await exchange.answers(model, rows, "logits")
    start = time.perf_counter()
    labels = model.manifest.labels
    data = []
    for i, probabilities in enumerate(found):
        best = top_k(probabilities, labels, k)
        data.append(Classified(i, best[0].label, best[0].probability, best))
    body = encoder.encode(ClassifyAnswer(model.name, model.version, data, Usage(tokens, tokens)))
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


async def read_classify(exchange: Exchange) -> tuple[Model, Rows, int]:
    kind = exchange.content_type.partition(";")[0].strip().lower()
    if kind in ("application/json", ""):
        body = await exchange.body()
        request = decode_json(body, classify_decoder)
        model = exchange.find(request.model, "logits")
        return model, await off_loop(len(body), model, json_rows, model, request.input), request.top_k
    if kind == "multipart/form-data":
        contents, fields = await read_form(exchange)
        model = exchange.find(fields.get("model") or exchange.query("model"), "logits")
        k = integer("top_k", fields.get("top_k") or exchange.query("top_k"))
        return model, await on_thread(file_rows, model, contents), k
    model = exchange.find(exchange.query("model"), "logits")
    k = integer("top_k", exchange.query("top_k"))
    body = await exchange.body()
    return model, await off_loop(len(body), model, raw_rows, model, kind, body), k


async def embeddings(exchange: Exchange) -> bytes:
    """EmbeddingsAnswer as JSON."""
    body = await exchange.body()
    request = decode_json(body, embeddings_decoder)
    model = exchange.find(request.model, "embedding")
    width = model.manifest.outputs[-1].shape[-1]
    if request.dimensions not in (None, width):
        raise ApiError(400, f"dimensions: {model.name} gives {width} and no other number", param="dimensions")
    rows, tokens = await off_loop(len(body), model, json_rows, model, request.input)
    found = normalize(np.stack(await exchange.answers(model, rows, "embedding")))
    start = time.perf_counter()
    plain = request.encoding_format == "float"
    data = [
        EmbeddingItem(i, row.tolist() if plain else base64.b64encode(row.astype("<f4").tobytes()).decode())
        for i, row in enumerate(found)
    ]
    answer = encoder.encode(EmbeddingsAnswer(model.name, data, Usage(tokens, tokens)))
    model.encode_seconds.observe(time.perf_counter() - start)
    return answer


async def off_loop(size: int, model: Model, function: Callable[..., Rows], *arguments: Any) -> Rows:
    """Call `function`, on a thread when it is likely to take longer than the hop: images, texts, large bodies."""
    if size <= INLINE_BYTES and isinstance(model.manifest.input, VectorInput | SeriesInput):
        return function(*arguments)
    if size <= INLINE_BYTES and function is raw_rows and arguments[1] == "application/octet-stream":
        return function(*arguments)
    return await on_thread(function, *arguments)


async def on_thread(function: Callable[..., Rows], *arguments: Any) -> Rows:
    return await asyncio.get_running_loop().run_in_executor(decoders, function, *arguments)


def json_rows(model: Model, raw: msgspec.Raw) -> Rows:
    """Graph rows from the `input` of a JSON body, and the tokens in them. Raises ApiError, BadInput."""
    spec = model.manifest.input
    if isinstance(spec, VectorInput):
        many = nested(raw)
        values = decode_input(raw, list[list[float]] if many else list[float], "a list of numbers")
        return [vector(row, spec) for row in (values if many else [values])], 0
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
    return [decode_image(data_url(item, i), spec) for i, item in enumerate(items)], 0


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
    spec = model.manifest.input
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
    spec = model.manifest.input
    if isinstance(spec, ImageInput):
        return [decode_image(content, spec) for content in contents], 0
    if isinstance(spec, TextInput):
        return text_rows(model, [utf8(content) for content in contents])
    if isinstance(spec, SeriesInput):
        return [series(content, spec) for content in contents], 0
    return [vector(content, spec) for content in contents], 0


def raw_rows(model: Model, kind: str, body: bytes) -> Rows:
    """Graph rows of a raw body."""
    spec = model.manifest.input
    if isinstance(spec, TextInput):
        if kind != "text/plain":
            raise ApiError(415, f"{model.name} reads text: send JSON, or text/plain instead of {kind}")
        return text_rows(model, [utf8(body)])
    if isinstance(spec, VectorInput):
        size = 4 * spec.features
        if kind != "application/octet-stream" or len(body) % size:
            takes = f"{model.name} reads vectors of {spec.features} float32 numbers ({size} bytes)"
            raise ApiError(400, f"{takes} as application/octet-stream; the body has {len(body)} bytes of {kind}")
        return [vector(body[i : i + size], spec) for i in range(0, len(body), size)], 0
    if isinstance(spec, SeriesInput):
        if kind != "application/octet-stream":
            takes = f"{model.name} reads series of {spec.channels} float32 numbers a step"
            raise ApiError(415, f"{takes}: send them as application/octet-stream or in JSON, not as {kind}")
        return [series(body, spec)], 0
    shape = (spec.height, spec.width, spec.channels)
    if kind == "application/octet-stream" and len(body) % (size := spec.height * spec.width * spec.channels) == 0:
        return list(np.frombuffer(body, np.uint8).reshape(-1, *shape)), 0
    if kind != "application/octet-stream" and not kind.startswith("image/"):
        raise ApiError(
            415, f"{model.name} reads images: send image/*, application/octet-stream, a form or JSON, not {kind}"
        )
    return [decode_image(body, spec)], 0


async def read_form(exchange: Exchange) -> tuple[list[bytes], dict[str, str]]:
    """The files and the fields of a form."""
    form = UploadForm(exchange.content_type, exchange.chunks())
    contents: list[bytes] = []
    while await form.next_file() is not None:
        contents.append(b"".join([piece async for piece in form.content()]))
    if not contents:
        raise ApiError(400, "the form has no file; send each input as a file", param="file")
    return contents, form.fields


def decode_json(body: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise ApiError(400, f"the body: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error


def decode_input(raw: msgspec.Raw, kind: Any, words: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"input: expected {words}: {error}", param="input") from error


def nested(raw: msgspec.Raw) -> bool:
    """Whether a JSON value is a list of lists."""
    return brackets(raw) > 1


def brackets(raw: msgspec.Raw) -> int:
    """How many lists a JSON value begins with, one inside the other."""
    start = b"".join(bytes(memoryview(raw)[:64]).split())
    return len(start) - len(start.lstrip(b"["))


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


def integer(name: str, text: str | None) -> int:
    if text is None:
        return DEFAULT_TOP_K
    try:
        return int(text)
    except ValueError as error:
        raise ApiError(400, f"{name}: {text!r} is no whole number", param=name) from error


def seconds_of(value: bytes) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise ApiError(400, "X-Request-Timeout: a positive number of seconds", param="X-Request-Timeout")
    return seconds


def too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit:,} bytes, the largest this server takes", code="body_too_large"
    )


@asgi("/v1/classify", copy_scope=False)
async def classify_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/classify", scope, receive, send, classify)


@asgi("/v1/embeddings", copy_scope=False)
async def embeddings_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/embeddings", scope, receive, send, embeddings)


handlers = [classify_route, embeddings_route]
