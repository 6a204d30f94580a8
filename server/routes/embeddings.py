"""POST /v1/embeddings: OpenAI's, for texts, images and vectors."""

from __future__ import annotations

import base64
import time
from typing import Literal

import msgspec
from litestar import asgi
from litestar.types import Receive, Scope, Send

from export.processing.answers import normalize
from server.errors import ApiError
from server.exchange import Exchange, Usage, encoder, handle
from server.rows import read_json


class EmbeddingsRequest(msgspec.Struct):
    """OpenAI's embeddings request."""

    model: str
    input: msgspec.Raw
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


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


decoder = msgspec.json.Decoder(EmbeddingsRequest)


async def embeddings(exchange: Exchange) -> bytes:
    """EmbeddingsAnswer as JSON."""
    model, (rows, tokens), request = await read_json(exchange, decoder, "embedding")
    width = next(output.shape[-1] for output in model.manifest.outputs if output.name == "embedding")
    if request.dimensions not in (None, width):
        raise ApiError(400, f"dimensions: {model.name} gives {width} and no other number", param="dimensions")
    found = normalize(await exchange.answers(model, rows, "embedding"))
    start = time.perf_counter()
    plain = request.encoding_format == "float"
    data = [
        EmbeddingItem(i, row.tolist() if plain else base64.b64encode(row.astype("<f4").tobytes()).decode())
        for i, row in enumerate(found)
    ]
    answer = encoder.encode(EmbeddingsAnswer(model.name, data, Usage(tokens, tokens)))
    model.encode_seconds.observe(time.perf_counter() - start)
    return answer


@asgi("/v1/embeddings", copy_scope=False)
async def embeddings_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/embeddings", scope, receive, send, embeddings)


handlers = [embeddings_route]
