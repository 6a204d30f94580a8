"""Small pictures for the document."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

DOTS = 90


def panels(count: int, width: float = 8.0, height: float = 3.2) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `count` panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for one in axes:
        one.grid(alpha=0.3)
    return figure, list(axes)


def png(figure: Figure) -> bytes:
    """With a palette, which keeps it small."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS)
    packed = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int = 1) -> str:
    """Markdown; columns from the `right`-th on are set to the right."""
    ruler = ["---" if i < right else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ruler, *rows))


@dataclass(frozen=True)
class Picture:
    """file: its name in the document's folder."""

    file: str
    caption: str
    content: bytes
