"""Pictures of what the rows have learned: their learning curves, and the images that the generating ones make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.architectures.claims.claim import Finished
from benchmarks.architectures.pictures import Picture, panels, png
from export.bundle import GraphSpec, Manifest, read_manifest

CURVES = ("lenet5", "mobilenet", "lstm", "convnet1d-words", "seq2seq-attention", "decoder")
# Runs that make images, and what is said of them.
GENERATORS = {
    "vae": "Digits that the variational autoencoder makes of latent vectors",
    "gan": "Digits that the dense generator of the adversarial network makes",
    "dcgan": "Digits that the convolutional generator of the adversarial network makes",
}
ROWS, COLUMNS = 4, 12


def gallery(finished: Finished) -> list[Picture]:
    """Of the runs that are done."""
    found = [
        Picture(f"{name}_samples.png", words, samples(finished.bundle(name)))
        for name, words in GENERATORS.items()
        if name in finished.trained
    ]
    curves = [name for name in CURVES if name in finished.trained]
    return [*([learning_curves(finished, curves)] if curves else []), *found]


def learning_curves(finished: Finished, names: list[str]) -> Picture:
    figure, panes = panels(len(names), width=12.0, height=2.6)
    for name, pane in zip(names, panes, strict=True):
        curve = finished.curve(name)
        pane.plot(*points(curve.curve, "train_loss"), color="0.6", linewidth=1, label="training")
        pane.plot(*points(curve.evaluations, "validation_loss"), "o-", markersize=3, label="validation")
        pane.set(title=name, xlabel="epoch")
    panes[0].set_ylabel("loss")
    panes[0].legend(fontsize=8)
    return Picture("learning_curves.png", "Learning curves of some of the rows", png(figure))


def points(curve: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    return [point["epoch"] for point in curve], [point[name] for point in curve]


def samples(folder: Path) -> bytes:
    """Images from latent vectors that are drawn from the prior, by the exported generator, as PNG."""
    name, graph = generator(read_manifest(folder))
    (latent,) = graph.inputs
    width = latent.shape[1]
    assert isinstance(width, int)
    drawn = np.random.default_rng(0).normal(size=(ROWS * COLUMNS, width)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    images = session.run(["image"], {latent.name: drawn})[0]
    figure, panes = panels(1, width=COLUMNS * 0.6, height=ROWS * 0.6)
    side = images.shape[1]
    grid = images.reshape(ROWS, COLUMNS, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(ROWS * side, -1, 3)
    panes[0].imshow(grid)
    panes[0].set_axis_off()
    return png(figure)


def generator(manifest: Manifest) -> tuple[str, GraphSpec]:
    """The graph that makes images from latent vectors, and its name."""
    graphs = {"model": GraphSpec(inputs=manifest.inputs, outputs=manifest.outputs), **manifest.graphs}
    return next((name, graph) for name, graph in graphs.items() if [one.name for one in graph.inputs] == ["latent"])
