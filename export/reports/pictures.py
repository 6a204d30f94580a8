"""Rows of images as one PNG: originals above what was made of them, samples."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure


def picture(rows: Mapping[str, np.ndarray]) -> bytes:
    """rows: uint8 [images, height, width, 3] by what is written beside them, of equal number."""
    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(1.0 + 0.9 * columns, 0.95 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (words, images) in zip(axes, rows.items(), strict=True):
        for place, image in zip(line, images, strict=False):
            place.imshow(image, interpolation="nearest")
        for place in line:
            place.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(words, fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()
