"""How good predicted numbers are on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure

from export.bundle import Interval

MOST_SHOWN = 6
MOST_POINTS = 2000


class NumberFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one target, in its unit. deviation: of the truth, the error of who always answers its mean. r2: 1 - squared
    errors / squared distances of the truth from its mean. interval_width: on average; coverage: the share of truths in
    their interval; both None where no interval is known."""

    name: str
    samples: int
    mae: float
    rmse: float
    r2: float
    deviation: float
    coverage: float | None
    interval_width: float | None


class Points(msgspec.Struct, frozen=True, kw_only=True):
    """Samples of one target, evenly picked where there are more than 2,000: truth and answer."""

    truth: list[float]
    value: list[float]


class RegressionReport(msgspec.Struct, frozen=True, kw_only=True):
    """mae, rmse, r2, coverage: means over the targets of the mean absolute error, the root mean squared error, R² and
    the share of truths in their interval. loss: the objective's own."""

    samples: int
    loss: float
    mae: float
    rmse: float
    r2: float
    coverage: float | None
    interval: Interval | None
    numbers: list[NumberFigures]
    points: list[Points]

    def figures(self) -> dict[str, float]:
        """The single numbers, by name."""
        found = {"loss": self.loss, "mae": self.mae, "rmse": self.rmse, "r2": self.r2}
        return found if self.coverage is None else {**found, "coverage": self.coverage}

    def plot(self, path: Path) -> None:
        """Answers over truths of each target, the six weakest of many, as one PNG."""
        shown = sorted(range(len(self.numbers)), key=lambda i: self.numbers[i].r2)[:MOST_SHOWN]
        columns = min(len(shown), 3)
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(4.6 * columns, 4.6 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, i in zip(panels, sorted(shown), strict=False):
            one, points = self.numbers[i], self.points[i]
            ends = [min(points.truth + points.value), max(points.truth + points.value)]
            axes.plot(ends, ends, color="grey", linestyle="--", linewidth=1)
            axes.plot(points.truth, points.value, "o", color="seagreen", markersize=3, alpha=0.5)
            axes.set(title=f"{one.name[:32]} (R² {one.r2:.3f})", xlabel="true", ylabel="answered")
        for axes in panels[len(shown) :]:
            axes.remove()
        figure.savefig(path, dpi=110)

    def words(self) -> str:
        rows = "\n".join(
            f"| {one.name} | {one.mae:.4g} | {one.rmse:.4g} | {one.deviation:.4g} | {one.r2:.4f} | "
            f"{_share(one.coverage)} | {'' if one.interval_width is None else f'{one.interval_width:.4g}'} |"
            for one in self.numbers
        )
        promised = "" if self.interval is None else f" (promised: {_share(self.interval.coverage)})"
        return (
            "The root mean squared error beside the deviation of the truth, which is the error of always answering the "
            f"mean{'' if self.coverage is None else f'; the share of truths in their interval{promised}'}:\n\n"
            "| number | MAE | RMSE | deviation | R² | in the interval | its width |\n|---|---|---|---|---|---|---|\n"
            f"{rows}"
        )


def evaluation(
    values: np.ndarray,
    targets: np.ndarray,
    names: Sequence[str],
    loss: float,
    interval: Interval | None = None,
    deviations: np.ndarray | None = None,
) -> RegressionReport:
    """values: float32 [samples, targets]; targets: the truths of the same shape, NaN where one is missing; deviations:
    those that were answered, which an interval of a normal distribution is made of. loss: of the objective."""
    numbers, points = [], []
    for i, name in enumerate(names):
        there = ~np.isnan(targets[:, i])
        value, truth = values[there, i].astype(np.float64), targets[there, i].astype(np.float64)
        error = value - truth
        around = np.square(truth - truth.mean()).sum() if len(truth) else 0.0
        squares = np.square(error).sum()
        margin: np.ndarray | None = None
        if interval is not None:
            margin = np.full(len(truth), interval.margins[i])
            if interval.method == "gaussian" and deviations is not None:
                margin = margin * deviations[there, i]
        numbers.append(
            NumberFigures(
                name=name,
                samples=len(truth),
                mae=float(np.abs(error).mean()) if len(truth) else 0.0,
                rmse=float(np.sqrt(np.square(error).mean())) if len(truth) else 0.0,
                r2=float(1.0 - squares / around) if around > 0.0 else float(squares == 0.0),
                deviation=float(truth.std()) if len(truth) else 0.0,
                coverage=None if margin is None or not len(truth) else float((np.abs(error) <= margin).mean()),
                interval_width=None if margin is None or not len(truth) else float(2.0 * margin.mean()),
            )
        )
        picked = np.unique(np.linspace(0, len(truth) - 1, MOST_POINTS).astype(int)) if len(truth) else np.array([], int)
        points.append(Points(truth=truth[picked].tolist(), value=value[picked].tolist()))
    known = [one for one in numbers if one.samples]
    covered = [one.coverage for one in known if one.coverage is not None]
    return RegressionReport(
        samples=len(values),
        loss=loss,
        mae=float(np.mean([one.mae for one in known])),
        rmse=float(np.mean([one.rmse for one in known])),
        r2=float(np.mean([one.r2 for one in known])),
        coverage=float(np.mean(covered)) if covered else None,
        interval=interval,
        numbers=numbers,
        points=points,
    )


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
