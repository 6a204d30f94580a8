"""The training curve, as a picture and as numbers."""

from __future__ import annotations

import io

import msgspec
from matplotlib import colormaps
from matplotlib.figure import Figure

from finetune.trainer import FitResult

COLOURS = colormaps["viridis"]


def numbers(result: FitResult) -> bytes:
    """JSON: {"curve", "evaluations", "gradient_norms"}, as in `finetune.checkpoint.Progress`."""
    kept = {"curve": result.curve, "evaluations": result.evaluations, "gradient_norms": result.gradient_norms}
    return msgspec.json.format(msgspec.json.encode(kept), indent=1)


def plot(result: FitResult) -> bytes:
    """PNG: losses, validation metrics, learning rate and the size of each block's gradient over the steps; the
    published weights are marked."""
    figure = Figure(figsize=(8.0, 10.5), layout="constrained")
    losses, metrics, rates, gradients = figure.subplots(4, 1, sharex=True)
    steps = [point["step"] for point in result.curve]
    measured = [point["step"] for point in result.evaluations]

    losses.plot(steps, [point["train_loss"] for point in result.curve], color="0.6", linewidth=1, label="training")
    losses.plot(measured, [p["validation_loss"] for p in result.evaluations], "o-", markersize=3, label="validation")
    losses.set_ylabel("loss")
    for name in [name for name in result.best_metrics if name != "loss"]:
        values = [point[f"validation_{name}"] for point in result.evaluations]
        metrics.plot(measured, values, "o-", markersize=3, label=name.replace("_", " "))
    metrics.set_ylabel("validation")
    rates.plot(steps, [point["learning_rate"] for point in result.curve], color="0.3", linewidth=1)
    rates.set(ylabel="learning rate")
    blocks = list({name: None for point in result.gradient_norms for name in point.norms})
    for i, name in enumerate(blocks):
        # A block that is released later has no gradient before.
        points = [(point.step, point.norms[name]) for point in result.gradient_norms if point.norms.get(name)]
        named = name if i in (0, len(blocks) - 1) else None  # the ends are enough to read the colours by
        gradients.plot(*zip(*points, strict=True), color=COLOURS(i / max(1, len(blocks) - 1)), linewidth=1, label=named)
    gradients.set(xlabel="step", ylabel="gradient norm of each block", yscale="log")
    for axes in (losses, metrics, rates, gradients):
        axes.axvline(result.best_step, color="tab:green", linestyle=":", linewidth=1, label="published")
        axes.grid(alpha=0.3)
    losses.legend()
    metrics.legend()
    gradients.legend()

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
