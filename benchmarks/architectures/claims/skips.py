"""Whether skip connections let a deep plain network train: the same layers with and without them."""

from __future__ import annotations

import numpy as np

from benchmarks.architectures.claims.claim import Claim, Finished, Section
from benchmarks.architectures.pictures import Picture, panels, png, table
from benchmarks.architectures.rows import recipe
from benchmarks.architectures.runs import Run

DEPTHS = (18, 34)
EPOCHS = 4
KINDS = {"plain": False, "residual": True}


def run_of(kind: str, depth: int) -> Run:
    hyperparameters = {"image_size": 32, "width": 0.125, "depth": depth, "skips": KINDS[kind]}
    return Run(
        name=f"{kind}-{depth}",
        file="some-digits.zip",
        recipe=recipe("resnet", hyperparameters, epochs=EPOCHS, rate=2e-3, evaluations_per_epoch=2),
    )


RUNS = tuple(run_of(kind, depth) for depth in DEPTHS for kind in KINDS)


def measure(finished: Finished) -> Section:
    figure, (losses, validations, norms) = panels(3, width=10.0)
    rows = []
    last: dict[str, float] = {}
    for run in RUNS:
        curve = finished.curve(run.name)
        colour = "tab:blue" if run.name.startswith("residual") else "tab:red"
        style = "-" if run.name.endswith(str(DEPTHS[-1])) else ":"
        steps = [point["step"] for point in curve.curve]
        smooth = running_mean([point["train_loss"] for point in curve.curve])
        losses.plot(steps, smooth, style, color=colour, label=run.name.replace("-", ", "))
        measured = [point["step"] for point in curve.evaluations]
        accuracy = [point["validation_accuracy"] for point in curve.evaluations]
        validations.plot(measured, accuracy, style, color=colour, marker="o", markersize=3)
        first = next(iter(curve.gradient_norms[0].norms))
        sizes = [point.norms[first] for point in curve.gradient_norms]
        norms.plot([point.step for point in curve.gradient_norms], running_mean(sizes), style, color=colour)
        last[run.name] = curve.evaluations[-1]["train_loss"]
        rows.append(
            (
                run.name.replace("-", ", "),
                f"{finished.trained[run.name].parameters:,}",
                f"{last[run.name]:.3f}",
                f"{finished.trained[run.name].metrics['accuracy']:.3f}",
                f"{np.median(sizes[: len(sizes) // 4]):.3f}",
                f"{np.median(sizes[-len(sizes) // 4 :]):.3f}",
            )
        )
    losses.set(xlabel="step", ylabel="training loss", yscale="log")
    losses.legend(fontsize=8)
    validations.set(xlabel="step", ylabel="validation accuracy")
    norms.set(xlabel="step", ylabel="gradient norm, first layer", yscale="log")
    deep, shallow = DEPTHS[-1], DEPTHS[0]
    cost = last[f"plain-{deep}"] - last[f"plain-{shallow}"]
    gain = last[f"residual-{deep}"] - last[f"residual-{shallow}"]
    header = ("network, layers", "parameters", "training loss at the end", "test accuracy", *NORMS)
    text = f"""ResNet's layers with and without its skip connections (batch norm in both), {EPOCHS} epochs on digits, \
same seed.

{table(header, rows)}

Going from {shallow} to {deep} layers changes the training loss at the end by {cost:+.3f} without skips and by \
{gain:+.3f} with them.
At {deep} layers it is {last[f"plain-{deep}"]:.3f} without and {last[f"residual-{deep}"]:.3f} with them."""
    holds = last[f"residual-{deep}"] < last[f"plain-{deep}"] and gain < cost
    return Section(
        "Skip connections let a deep network train",
        holds,
        text,
        (Picture("skips.png", "Deep plain and residual networks", png(figure)),),
    )


NORMS = ("first layer's gradient, first quarter", "last quarter")


def running_mean(values: list[float], window: int = 9) -> np.ndarray:
    """Of each value and those before it."""
    sums = np.cumsum([0.0, *values])
    begin = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    end = np.arange(1, len(values) + 1)
    return np.asarray((sums[end] - sums[begin]) / (end - begin))


CLAIM = Claim("skips", measure, RUNS)
