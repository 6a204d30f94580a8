"""How good a classifier that gives sets of labels is on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure

from export.processing.answers import sigmoid
from export.reports.classification import MOST_LISTED, MOST_SHOWN, ClassFigures

THRESHOLD = 0.5
THRESHOLDS = 99


class Operating(msgspec.Struct, frozen=True, kw_only=True):
    """Over all labels and samples together, with the labels from this probability on as the set."""

    threshold: float
    precision: float
    recall: float
    f1: float


class MultiLabelReport(msgspec.Struct, frozen=True, kw_only=True):
    """Sets are the labels of probability 0.5 and more. loss: mean binary cross-entropy of a label, in nats.
    subset_accuracy: the share of samples whose set is right in every label. micro: over all labels and samples
    together; macro_f1: mean F1 of the labels that occur. A ratio over nothing is 0."""

    samples: int
    loss: float
    subset_accuracy: float
    micro_precision: float
    micro_recall: float
    micro_f1: float
    macro_f1: float
    classes: list[ClassFigures]
    thresholds: list[Operating]

    def figures(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {
            "loss": self.loss,
            "subset_accuracy": self.subset_accuracy,
            "micro_f1": self.micro_f1,
            "macro_f1": self.macro_f1,
            "micro_precision": self.micro_precision,
            "micro_recall": self.micro_recall,
        }

    def plot(self, path: Path) -> None:
        """Precision, recall and F1 of each label, and of all together at every threshold, as one PNG. Of many labels,
        the weakest 30 are shown."""
        shown = sorted(self.classes, key=lambda one: one.f1)[:MOST_SHOWN]
        figure = Figure(figsize=(11.0, 3.5 + 0.3 * len(shown)), layout="constrained")
        bars, curve = figure.subplots(1, 2)
        places = np.arange(len(shown))
        for i, (name, colour) in enumerate((("precision", "0.75"), ("recall", "0.5"), ("f1", "seagreen"))):
            values = [getattr(one, name) for one in shown]
            bars.barh(places + 0.25 * (i - 1), values, height=0.25, color=colour, label=name)
        bars.set_yticks(places, [f"{one.label[:24]} ({one.support})" for one in shown], fontsize=8)
        bars.invert_yaxis()
        left_out = "" if len(shown) == len(self.classes) else f", the {MOST_SHOWN} weakest of {len(self.classes)}"
        bars.set(title=f"By label{left_out} (macro F1 {self.macro_f1:.3f})", xlim=(0, 1))
        bars.legend(fontsize=8)
        at = [one.threshold for one in self.thresholds]
        for name, colour in (("precision", "0.75"), ("recall", "0.5"), ("f1", "seagreen")):
            curve.plot(at, [getattr(one, name) for one in self.thresholds], color=colour, label=name)
        curve.axvline(THRESHOLD, color="grey", linestyle="--", linewidth=1)
        curve.set(title=f"All labels together (micro F1 {self.micro_f1:.3f} at {THRESHOLD})", xlabel="threshold")
        curve.set(xlim=(0, 1), ylim=(0, 1))
        curve.legend(fontsize=8)
        figure.savefig(path, dpi=110)

    def words(self) -> str:
        figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in self.figures().items())
        rows = sorted(self.classes, key=lambda c: c.f1)[:MOST_LISTED]
        classes = "\n".join(
            f"| {c.label} | {c.precision:.3f} | {c.recall:.3f} | {c.f1:.3f} | {c.support} |" for c in rows
        )
        best = max(self.thresholds, key=lambda one: one.f1)
        return (
            f"| metric | value |\n|---|---|\n{figures}\n\nBy label, weakest first, at the threshold {THRESHOLD}:\n\n"
            f"| label | precision | recall | F1 | samples |\n|---|---|---|---|---|\n{classes}\n\n"
            f"The best micro F1 is {best.f1:.3f}, at the threshold {best.threshold:.2f}."
        )


def evaluation(logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> MultiLabelReport:
    """logits: float32 [samples, labels]; targets: 0 and 1 of the same shape; labels[i] names column i."""
    numbers = logits.astype(np.float64)
    probabilities, true = sigmoid(numbers), targets > 0.5
    answered = probabilities >= THRESHOLD
    hits, support, given = (answered & true).sum(axis=0), true.sum(axis=0), answered.sum(axis=0)
    precision, recall = hits / np.maximum(given, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(given + support, 1)
    losses = np.maximum(numbers, 0.0) - numbers * true + np.log1p(np.exp(-np.abs(numbers)))
    whole = _together(probabilities, true, THRESHOLD)
    return MultiLabelReport(
        samples=len(logits),
        loss=float(losses.mean()),
        subset_accuracy=float((answered == true).all(axis=1).mean()),
        micro_precision=whole.precision,
        micro_recall=whole.recall,
        micro_f1=whole.f1,
        macro_f1=float(f1[support > 0].mean()) if support.any() else 0.0,
        classes=[
            ClassFigures(label=label, precision=float(p), recall=float(r), f1=float(f), support=int(s))
            for label, p, r, f, s in zip(labels, precision, recall, f1, support, strict=True)
        ],
        thresholds=[_together(probabilities, true, i / (THRESHOLDS + 1)) for i in range(1, THRESHOLDS + 1)],
    )


def _together(probabilities: np.ndarray, true: np.ndarray, threshold: float) -> Operating:
    answered = probabilities >= threshold
    hits, given, support = int((answered & true).sum()), int(answered.sum()), int(true.sum())
    return Operating(
        threshold=threshold,
        precision=hits / max(given, 1),
        recall=hits / max(support, 1),
        f1=2 * hits / max(given + support, 1),
    )
