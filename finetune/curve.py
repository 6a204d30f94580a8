"""The training curve as a picture."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from finetune.trainer import FitResult


def plot(result: FitResult) -> bytes:
    """PNG: losses, validation metrics and learning rate over the steps; the published weights are marked."""
    figure = Figure(figsize=(8.0, 8.0), layout="constrained")
    losses, metrics, rates = figure.subplots(3, 1, sharex=True)
    steps = [point["step"] for point in result.curve]
    measured = [point["step"] for point in result.evaluations]

    losses.plot(steps, [point["train_loss"] for point in result.curve], color="0.6", linewidth=1, label="training")
    losses.plot(measured, [p["validation_loss"] for p in result.evaluations], "o-", markersize=3, label="validation")
    losses.set_ylabel("loss")
    for name in ("accuracy", "macro_f1"):
        values = [point[f"validation_{name}"] for point in result.evaluations]
        metrics.plot(measured, values, "o-", markersize=3, label=name.replace("_", " "))
    metrics.set_ylabel("validation")
    rates.plot(steps, [point["learning_rate"] for point in result.curve], color="0.3", linewidth=1)
    rates.set(xlabel="step", ylabel="learning rate")
    for axes in (losses, metrics, rates):
        axes.axvline(result.best_step, color="tab:green", linestyle=":", linewidth=1, label="published")
        axes.grid(alpha=0.3)
    losses.legend()
    metrics.legend()

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
