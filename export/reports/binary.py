"""How good a classifier of two labels is on held-out data: as of any classifier, and at every threshold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure

from export.processing.answers import sigmoid
from export.reports import classification
from export.reports.classification import ClassificationReport

MOST_POINTS = 200


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """What it means to answer the second label from this probability on. Rates: of all samples of the second label
    (true) and of the first (false) that are answered so; precision: of those that are answered so."""

    threshold: float
    true_positive_rate: float
    false_positive_rate: float
    precision: float
    f1: float


class BinaryReport(ClassificationReport, frozen=True, kw_only=True):
    """roc_auc: the probability that a sample of the second label is answered a higher one than a sample of the first;
    0.5 where a label does not occur. average_precision: Σ precision · the recall it adds. best: the threshold with the
    best F1 of the second label. thresholds: from the highest to the lowest, 200 at most."""

    roc_auc: float
    average_precision: float
    best: Threshold
    thresholds: list[Threshold]

    def figures(self) -> dict[str, float]:
        more = {"roc_auc": self.roc_auc, "average_precision": self.average_precision}
        return {**super().figures(), **more}

    def plot(self, path: Path) -> None:
        """Receiver operating characteristic, precision over recall, and calibration as one PNG."""
        figure = Figure(figsize=(13.0, 4.4), layout="constrained")
        roc, curve, diagram = figure.subplots(1, 3)
        false = [0.0, *(one.false_positive_rate for one in self.thresholds)]
        true = [0.0, *(one.true_positive_rate for one in self.thresholds)]
        roc.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        roc.step(false, true, where="post", color="seagreen")
        roc.plot(self.best.false_positive_rate, self.best.true_positive_rate, "o", color="black", markersize=4)
        roc.set(title=f"ROC (area {self.roc_auc:.3f})", xlabel="false positive rate", ylabel="true positive rate")
        curve.step(true[1:], [one.precision for one in self.thresholds], where="pre", color="seagreen")
        curve.plot(self.best.true_positive_rate, self.best.precision, "o", color="black", markersize=4)
        curve.set(title=f"Precision (average {self.average_precision:.3f})", xlabel="recall", ylabel="precision")
        curve.set(xlim=(0, 1.02), ylim=(0, 1.02))
        self.draw_calibration(diagram)
        figure.savefig(path, dpi=110)

    def words(self) -> str:
        second = self.classes[1].label
        return (
            f"{super().words()}\n\nThe best F1 of `{second}`, {self.best.f1:.3f}, is had from the probability "
            f"{self.best.threshold:.3f} on: precision {self.best.precision:.3f}, recall "
            f"{self.best.true_positive_rate:.3f}."
        )


def evaluation(logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> BinaryReport:
    """logits: float32 [samples], of the second of two labels; targets: int [samples], 0 and 1."""
    found = classification.evaluation(np.stack([np.zeros_like(logits), logits], axis=1), targets, labels)
    order = np.argsort(-logits, kind="stable")
    last = np.append(np.flatnonzero(np.diff(logits[order])), len(logits) - 1)  # of equal ones all or none are answered
    true = np.cumsum(targets[order] == 1)[last]
    answered = last + 1
    false = answered - true
    positive, negative = max(int(true[-1]), 1), max(int(false[-1]), 1)
    recall, fallout, precision = true / positive, false / negative, true / answered
    f1 = 2 * true / (answered + int(true[-1]))
    both = true[-1] > 0 and false[-1] > 0

    def at(i: int) -> Threshold:
        return Threshold(
            threshold=float(sigmoid(logits[order[last[i]]].astype(np.float64))),
            true_positive_rate=float(recall[i]),
            false_positive_rate=float(fallout[i]),
            precision=float(precision[i]),
            f1=float(f1[i]),
        )

    shown = np.unique(np.linspace(0, len(last) - 1, MOST_POINTS).astype(int))
    return BinaryReport(
        **msgspec.structs.asdict(found),
        roc_auc=float(np.trapezoid(np.append(0.0, recall), np.append(0.0, fallout))) if both else 0.5,
        average_precision=float((np.diff(recall, prepend=0.0) * precision).sum()),
        best=at(int(f1.argmax())),
        thresholds=[at(int(i)) for i in shown],
    )
