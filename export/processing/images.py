"""Image files to the pixels that enter a graph, and back. Training and serving both read them by `decode_image`."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from export.processing.inputs import BadInput, ImageInput

MAX_PIXELS = 50_000_000
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def open_image(data: bytes) -> Image.Image:
    """The image in a file's bytes, its size checked, its pixels not yet decoded. Raises BadInput."""
    if not data:
        raise BadInput("the image is empty: 0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the one that counts
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadInput(f"the image is too large: {error}; at most {MAX_PIXELS:,} pixels are accepted") from error
    except Exception as error:  # Pillow's many decoders raise what they like on broken headers
        raise BadInput("the bytes are not an image in a format that can be read (PNG, JPEG, WebP, ...)") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadInput(f"the image has {width} x {height} pixels; at most {MAX_PIXELS:,} are accepted")
    return image


def decode_image(data: bytes, spec: ImageInput) -> np.ndarray:
    """A PNG, JPEG, WebP, ... file to uint8 [height, width, channels] as `spec` says.

    Turned as its EXIF data say; transparency over white; 16 bits scaled to 8; of an animation the first frame.
    Raises BadInput when it is no image, truncated or too large.
    """
    image = open_image(data)
    try:
        image.load()
        image = _eight_bit(ImageOps.exif_transpose(image), "L" if spec.channels == 1 else "RGB")
    except BadInput:
        raise
    except Exception as error:  # as above, on broken bodies
        raise BadInput(f"the image is damaged: {error}") from error
    pixels = np.asarray(_resize(image, spec), dtype=np.uint8)
    return pixels.reshape(spec.height, spec.width, spec.channels)


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [height, width, 3] as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max(initial=0.0) > 255.0 else 255.0
        image = Image.fromarray(np.clip(values * (255.0 / top), 0.0, 255.0).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _resize(image: Image.Image, spec: ImageInput) -> Image.Image:
    size, method = (spec.width, spec.height), FILTERS[spec.interpolation]
    if spec.resize == "stretch":
        return image if image.size == size else image.resize(size, method)
    if spec.resize == "pad":
        return ImageOps.pad(image, size, method, color=0)
    # The centre that remains of a whole resize, cut out before it: fewer pixels are computed.
    width, height = image.size
    scale = min(width / spec.width, height / spec.height) * spec.crop_fraction
    cut_width, cut_height = spec.width * scale, spec.height * scale
    left, top = (width - cut_width) / 2, (height - cut_height) / 2
    return image.resize(size, method, box=(left, top, left + cut_width, top + cut_height))
