"""How near generated images come to held-out ones: figures for programs, a picture for people.

There is no network here that knows photographs, so nothing is said of how a person would judge the images. What is
measured is the Fréchet distance between normal distributions fitted to both sets (Heusel et al. 2017 did so with
features of a trained network) in the space of the training images' 32 first principal components: whether colours,
large shapes and how they go together are those of the data. 1 is the whole variance of the training images.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from export.processing.images import encode_png

# What is kept of each held-out image and the generated one beside it; see models.gan.Gan.compare.
NEEDED = ("real", "generated", "real_features", "generated_features", "independent_features", "image")
ROWS = 6


class GenerationReport(msgspec.Struct, frozen=True, kw_only=True):
    """frechet_distance: of held-out to as many generated images. Beside it, for what such a figure is worth:
    frechet_held_out, of one half of the held-out images to the other, about the least that can be had; and
    frechet_independent, of images whose every pixel has the right mean and deviation and knows no other.

    discriminator_accuracy: share of held-out and generated images that it tells rightly, 0.5 being a guess.
    discriminator_loss, generator_loss: in nats. images: a PNG of 6 × 6 generated ones, in base64.
    """

    samples: int
    loss: float
    frechet_distance: float
    frechet_held_out: float
    frechet_independent: float
    discriminator_accuracy: float
    discriminator_loss: float
    generator_loss: float
    images: bytes

    def figures(self) -> dict[str, float]:
        """The single numbers, by name."""
        names = [name for name in self.__struct_fields__ if name not in ("samples", "images")]
        return {name: getattr(self, name) for name in names}

    def plot(self, path: Path) -> None:
        """Generated images, and the Fréchet distances beside each other, as one PNG."""
        figure = Figure(figsize=(12.0, 6.0), layout="constrained")
        grid, bars = figure.subplots(1, 2, width_ratios=[2, 1])
        grid.imshow(np.asarray(Image.open(io.BytesIO(self.images))), interpolation="nearest")
        grid.set(title="Generated", xticks=[], yticks=[])
        distances = {
            "held-out half\nto the other": self.frechet_held_out,
            "generated": self.frechet_distance,
            "independent\npixels": self.frechet_independent,
        }
        drawn = bars.bar(distances.keys(), distances.values(), color=["0.7", "seagreen", "0.7"])
        bars.bar_label(drawn, fmt="%.3f")
        bars.set(title=f"Fréchet distance to {self.samples} held-out images")
        figure.savefig(path, dpi=120)

    def words(self) -> str:
        """Markdown for the model card."""
        rows = [f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in self.figures().items()]
        meaning = (
            "The Fréchet distance is one between normal distributions in the space of the training images' 32 first "
            "principal components, whose whole variance is 1; `frechet held out` is that of one half of the held-out "
            "images to the other, `frechet independent` that of images whose pixels are drawn each by itself. It says "
            "whether colours and large shapes are those of the data, not how the images look to people."
        )
        return "\n".join(["| figure | value |", "| --- | --- |", *rows]) + f"\n\n{meaning}"


def evaluation(kept: Mapping[str, np.ndarray], loss: float) -> GenerationReport:
    """kept: `NEEDED` and both players' losses, [items, ...] each. loss: the objective's."""
    real = kept["real_features"].astype(np.float64)
    distances = {
        name: frechet_distance(real, kept[f"{name}_features"].astype(np.float64))
        for name in ("generated", "independent")
    }
    return GenerationReport(
        samples=len(real),
        loss=loss,
        frechet_distance=distances["generated"],
        frechet_held_out=frechet_distance(real[::2], real[1::2] if len(real) > 1 else real),
        frechet_independent=distances["independent"],
        discriminator_accuracy=float((np.mean(kept["real"] > 0.0) + np.mean(kept["generated"] <= 0.0)) / 2.0),
        discriminator_loss=float(kept["discriminator_loss"].mean()),
        generator_loss=float(kept["generator_loss"].mean()),
        images=encode_png(grid(kept["image"][: ROWS * ROWS])),
    )


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """|μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½) of float64 [items, features] each (Dowson and Landau 1982)."""
    gap = one.mean(axis=0) - other.mean(axis=0)
    first, second = (np.atleast_2d(np.cov(features, rowvar=False, bias=True)) for features in (one, other))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    # The eigenvalues of C₁ C₂ are those of the symmetric C₁^½ C₂ C₁^½.
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0.0)).sum()
    return max(0.0, float(gap @ gap + np.trace(first) + np.trace(second) - 2.0 * shared))


def grid(images: np.ndarray) -> np.ndarray:
    """uint8 [items, height, width, 3], at most 36, to one picture of six a row; white where there are fewer."""
    items, height, width, channels = images.shape
    whole = np.full((-(-items // ROWS) * ROWS, height, width, channels), 255, np.uint8)
    whole[:items] = images
    rows = whole.reshape(-1, ROWS, height, width, channels).transpose(0, 2, 1, 3, 4)
    return rows.reshape(-1, ROWS * width, channels)
