"""What raw input must become before it enters a graph, as data in the manifest. One Struct a modality."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


class ImageInput(msgspec.Struct, frozen=True, kw_only=True, tag="image", tag_field="type", forbid_unknown_fields=True):
    """Graph input `pixels`: uint8 [batch, height, width, channels], RGB or grey, normalized inside the graph.

    resize: "stretch" to (height, width); "crop": shorter side to size / crop_fraction, then the centre;
        "pad": longer side to size, the rest black.
    """

    height: int
    width: int
    channels: Literal[1, 3] = 3
    resize: Literal["stretch", "crop", "pad"] = "crop"
    crop_fraction: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.875
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"


class TextInput(msgspec.Struct, frozen=True, kw_only=True, tag="text", tag_field="type", forbid_unknown_fields=True):
    """Graph inputs `input_ids` and `attention_mask`: int64 [batch, sequence]; longer texts are cut at max_length.

    bos_token_id, eos_token_id: what begins and ends a text; None where the tokenizer has none.
    """

    max_length: int
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tokenizer: str = "tokenizer.json"


class VectorInput(
    msgspec.Struct, frozen=True, kw_only=True, tag="vector", tag_field="type", forbid_unknown_fields=True
):
    """Graph input `vector`: float32 [batch, features], standardized inside the graph."""

    features: int
    names: list[str] = []


class SeriesInput(
    msgspec.Struct, frozen=True, kw_only=True, tag="series", tag_field="type", forbid_unknown_fields=True
):
    """Graph inputs `series`: float32 [batch, length, channels], standardized inside the graph, and `attention_mask`:
    int64 [batch, length]. A series longer than max_length is refused."""

    channels: int
    max_length: int


# What networks learn from.
DataInput = ImageInput | TextInput | VectorInput | SeriesInput


class LatentInput(
    msgspec.Struct, frozen=True, kw_only=True, tag="latent", tag_field="type", forbid_unknown_fields=True
):
    """Graph input `latent`: float32 [batch, size], drawn from a standard normal distribution. images: how those that
    the model learned from were read, and those are read that it goes on with."""

    size: int
    images: ImageInput


# What a served graph takes.
InputSpec = DataInput | LatentInput


class BadInput(ValueError):
    """Input that cannot be answered; the message says what is wrong and what to do. Becomes a 400."""
