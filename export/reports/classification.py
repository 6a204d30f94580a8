"""How good a classifier is on held-out data: figures for programs, a picture for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from export.processing.answers import softmax

BINS = 15
MOST_SHOWN = 30
MOST_LISTED = 50


class ClassFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one label; `support` is the number of its samples. A ratio over nothing is 0."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


class CalibrationBin(msgspec.Struct, frozen=True, kw_only=True):
    """Samples whose winning probability lies in (low, low + 1/15]."""

    low: float
    samples: int
    confidence: float
    accuracy: float


class ClassificationReport(msgspec.Struct, frozen=True, kw_only=True):
    """loss: mean cross-entropy in nats. macro_f1: mean F1 of the labels that occur. calibration_error: expected
    |accuracy - confidence| over 15 equal bins (Naeini et al. 2015). confusion[i][j]: samples of label i answered j."""

    samples: int
    loss: float
    accuracy: float
    macro_f1: float
    calibration_error: float
    classes: list[ClassFigures]
    confusion: list[list[int]]
    calibration: list[CalibrationBin]

    def figures(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "calibration_error": self.calibration_error,
        }

    def plot(self, path: Path) -> None:
        """Confusion matrix, F1 of each label and calibration as one PNG. Of many labels, the weakest 30 are shown."""
        order = sorted(range(len(self.classes)), key=lambda i: self.classes[i].f1)
        shown = sorted(order[:MOST_SHOWN])
        labels = [self.classes[i].label[:24] for i in shown]
        matrix = np.array(self.confusion)[np.ix_(shown, shown)]
        side = 4.0 + 0.22 * len(shown)
        figure = Figure(figsize=(side + 8.0, side), layout="constrained")
        heat, bars, diagram = figure.subplots(1, 3, width_ratios=[side, 4.0, 4.0])

        heat.imshow(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), cmap="Greens", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                strong = count > 0.6 * matrix[row].sum()
                heat.text(
                    column, row, str(count), ha="center", va="center", fontsize=7, color="white" if strong else "black"
                )
        heat.set_xticks(range(len(shown)), labels, rotation=90, fontsize=8)
        heat.set_yticks(range(len(shown)), labels, fontsize=8)
        left_out = "" if len(shown) == len(order) else f" (the {MOST_SHOWN} weakest of {len(order)} labels)"
        heat.set(title=f"Confusion{left_out}", xlabel="answered", ylabel="true")

        bars.barh(range(len(shown)), [self.classes[i].f1 for i in shown], color="seagreen")
        bars.set_yticks(range(len(shown)), labels, fontsize=8)
        bars.invert_yaxis()
        bars.set(title=f"F1 (macro {self.macro_f1:.3f}, accuracy {self.accuracy:.3f})", xlim=(0, 1))

        self.draw_calibration(diagram)
        figure.savefig(path, dpi=110)

    def draw_calibration(self, diagram: Axes) -> None:
        diagram.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="perfect")
        diagram.bar(
            [b.low for b in self.calibration],
            [b.accuracy for b in self.calibration],
            width=1 / BINS,
            align="edge",
            color="seagreen",
            edgecolor="white",
        )
        diagram.plot(
            [b.confidence for b in self.calibration],
            [b.accuracy for b in self.calibration],
            "o",
            color="black",
            markersize=3,
        )
        diagram.set(title=f"Calibration (error {self.calibration_error:.3f})", xlabel="confidence", ylabel="accuracy")
        diagram.set(xlim=(0, 1), ylim=(0, 1))

    def words(self) -> str:
        figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in self.figures().items())
        rows = sorted(self.classes, key=lambda c: c.f1)[:MOST_LISTED]
        classes = "\n".join(
            f"| {c.label} | {c.precision:.3f} | {c.recall:.3f} | {c.f1:.3f} | {c.support} |" for c in rows
        )
        return (
            f"| metric | value |\n|---|---|\n{figures}\n\nBy label, weakest first:\n\n"
            f"| label | precision | recall | F1 | samples |\n|---|---|---|---|---|\n{classes}"
        )


def evaluation(logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> ClassificationReport:
    """logits: float32 [samples, classes]; targets: int [samples]; labels[i] names logit i."""
    samples, classes = logits.shape
    probabilities = softmax(logits.astype(np.float64))
    winners = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    right = winners == targets
    confusion = np.bincount(targets * classes + winners, minlength=classes * classes).reshape(classes, classes)
    hits, support, answered = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    precision = hits / np.maximum(answered, 1)
    recall = hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(answered + support, 1)
    bins = []
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    for i in range(BINS):
        inside = place == i
        if inside.any():
            bins.append(
                CalibrationBin(
                    low=i / BINS,
                    samples=int(inside.sum()),
                    confidence=float(confidence[inside].mean()),
                    accuracy=float(right[inside].mean()),
                )
            )
    chosen = probabilities[np.arange(samples), targets]
    return ClassificationReport(
        samples=samples,
        loss=float(-np.log(np.maximum(chosen, 1e-300)).mean()),
        accuracy=float(right.mean()),
        macro_f1=float(f1[support > 0].mean()),
        calibration_error=sum(b.samples / samples * abs(b.accuracy - b.confidence) for b in bins),
        classes=[
            ClassFigures(label=label, precision=float(p), recall=float(r), f1=float(f), support=int(s))
            for label, p, r, f, s in zip(labels, precision, recall, f1, support, strict=True)
        ],
        confusion=confusion.tolist(),
        calibration=bins,
    )
