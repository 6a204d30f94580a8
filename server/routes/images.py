"""POST /v1/images/generations: OpenAI's, for models that make images from noise.

Such models are not conditioned on anything: `prompt`, which OpenAI's clients must send, is taken and not used. What
image is made follows from the latent vector, and that from `seed`; or it is given, or lies on the way between two.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from litestar import asgi
from litestar.types import Receive, Scope, Send

from export.processing.images import encode_png
from export.processing.inputs import BadInput
from export.processing.latents import between, drawn, given
from server.errors import ApiError
from server.exchange import Exchange, decode_json, encoder, handle
from server.rows import on_thread
from server.runtime.answers import Generator

MOST_IMAGES = 128

Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Vector = Annotated[list[float], msgspec.Meta(min_length=1, max_length=4096)]


class Interpolation(msgspec.Struct, forbid_unknown_fields=True):
    """A row of `steps` images from one to the other, each a seed (its first image) or a latent vector."""

    start: Seed | Vector = msgspec.field(name="from")
    end: Seed | Vector = msgspec.field(name="to")
    steps: Annotated[int, msgspec.Meta(ge=2, le=MOST_IMAGES)] = 8


class ImagesRequest(msgspec.Struct):
    """OpenAI's images request. prompt: taken and not used. size: "auto" or the model's own, "64x64".

    Ours: one of `seed` (the same seed makes the same images; None: another one each time), `latent` (a vector for each
    image) and `interpolation`; with the last two, n is left out.
    """

    model: str
    prompt: str | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MOST_IMAGES)] | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool | None = None
    seed: Seed | None = None
    latent: Annotated[list[Vector], msgspec.Meta(min_length=1, max_length=MOST_IMAGES)] | None = None
    interpolation: Interpolation | None = None


class ImageItem(msgspec.Struct):
    """`b64_json`: a PNG file in base64."""

    b64_json: str


class ImagesAnswer(msgspec.Struct):
    """`seed`: what the images were drawn with, None for given latent vectors and interpolations."""

    created: int
    data: list[ImageItem]
    model: str
    version: int
    seed: int | None
    size: str
    output_format: str = "png"


decoder = msgspec.json.Decoder(ImagesRequest)


async def images(exchange: Exchange) -> bytes:
    """ImagesAnswer as JSON."""
    request: ImagesRequest = decode_json(await exchange.body(), decoder)
    model = await exchange.find(request.model, "generate")
    generator = model.generator
    assert generator is not None, "a model that makes images has one"
    size = f"{generator.width}x{generator.height}"
    if request.size not in (None, "auto", size):
        raise ApiError(400, f'size: {model.name} makes images of {size}; leave it out, or say "auto"', param="size")
    if request.response_format == "url":
        raise ApiError(400, "response_format: images are kept nowhere; ask for b64_json", param="response_format")
    if request.stream:
        raise ApiError(400, "stream: an image is whole at once; leave it out", param="stream")
    seed = request.seed
    if request.latent is None and request.interpolation is None and seed is None:
        seed = secrets.randbelow(2**32)
    rows = await on_thread(latents, request, seed, generator)
    found = await exchange.result(exchange.submit(model, rows, "generate", "n").future)
    start = time.perf_counter()
    data = await on_thread(encoded, found)
    answer = ImagesAnswer(int(time.time()), data, model.name, model.version, seed, size)
    body = encoder.encode(answer)
    model.encode_seconds.observe(time.perf_counter() - start)
    return body


def latents(request: ImagesRequest, seed: int | None, generator: Generator) -> np.ndarray:
    """float32 [images, latent]: what the images are made from. Raises ApiError when that is said twice, and for
    a vector that is none of this model."""
    said = [name for name in ("seed", "latent", "interpolation") if getattr(request, name) is not None]
    if len(said) > 1:
        raise ApiError(400, f"{said[1]}: {said[0]} says already which images; give one of them", param=said[1])

    def vector(which: int | list[float], where: str) -> np.ndarray:
        if isinstance(which, int):
            first: np.ndarray = drawn(which, 1, generator.latent)[0]
            return first
        try:
            return given(which, generator.latent, where)
        except BadInput as error:
            raise ApiError(400, str(error), param=said[0]) from error

    if request.latent is None and request.interpolation is None:
        assert seed is not None, "it is drawn where none is given"
        return drawn(seed, request.n or 1, generator.latent)
    if request.interpolation is not None:
        way = request.interpolation
        start, end = vector(way.start, "interpolation.from"), vector(way.end, "interpolation.to")
        found = between(start, end, way.steps)
    else:
        found = np.stack([vector(one, f"latent {i}") for i, one in enumerate(request.latent or [])])
    if request.n not in (None, len(found)):
        raise ApiError(400, f"n: {said[0]} asks for {len(found)} images; leave n out", param="n")
    return found


def encoded(pictures: Sequence[np.ndarray]) -> list[ImageItem]:
    """uint8 [height, width, 3] each, as PNG."""
    return [ImageItem(base64.b64encode(encode_png(pixels)).decode()) for pixels in pictures]


@asgi("/v1/images/generations", copy_scope=False)
async def images_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/images/generations", scope, receive, send, images)


handlers = [images_route]
