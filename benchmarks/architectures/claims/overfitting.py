"""Whether dropout and early stopping narrow the gap between training and validation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from benchmarks.architectures import data, runs
from benchmarks.architectures.claims.claim import Claim, Finished, Section
from benchmarks.architectures.held_out import Part, held_out
from benchmarks.architectures.pictures import Picture, panels, png, table
from benchmarks.architectures.rows import recipe
from benchmarks.architectures.runs import Run
from finetune.recipe import Data, Schedule, Stopping
from models import registry
from models.network import Network

EPOCHS = 60
PATIENCE = 5


def run_of(name: str, dropout: bool = False, **sections: Any) -> Run:
    hidden = {"hidden": [512, 512], "dropout": 0.5 * dropout, "input_dropout": 0.2 * dropout}
    made = recipe(
        "mlp", hidden, epochs=EPOCHS, rate=1e-3, data=Data(validation=0.3, test=0.1), schedule=CONSTANT, **sections
    )
    return Run(name=f"overfitting-{name}", file="some-small-digit-vectors.csv", recipe=made)


CONSTANT = Schedule(warmup=0.0, decay="constant")
RUNS = {
    "neither": run_of("neither"),
    "early stopping": run_of("stopping", stopping=Stopping(patience=PATIENCE)),
    "dropout": run_of("dropout", dropout=True),
    "both": run_of("both", dropout=True, stopping=Stopping(patience=PATIENCE)),
}


def measure(finished: Finished) -> Section:
    figure, panes = panels(len(RUNS), width=10.0, height=2.8)
    rows = []
    gaps: dict[str, float] = {}
    for (words, run), pane in zip(RUNS.items(), panes, strict=True):
        items = held_out(data.prepared(run.file, runs.files(finished.folder)), run.recipe)
        network = registry.restore(finished.bundle(run.name)).eval()
        curve = finished.curve(run.name)
        step = curve.evaluations[-1]["step"]
        if run.recipe.stopping is None:
            network.load_state_dict(load_file(finished.checkpoint(run.name)))
        else:
            step = min(curve.evaluations, key=lambda one: one["validation_loss"])["step"]
        losses = [loss(network, part) for part in (items.train, items.validation)]
        gaps[words] = losses[1] - losses[0]
        epoch = next(one["epoch"] for one in curve.evaluations if one["step"] == step)
        rows.append((words, f"{epoch:.0f}", *(f"{one:.3f}" for one in losses), f"{gaps[words]:.3f}"))
        epochs = [one["epoch"] for one in curve.evaluations]
        pane.plot(epochs, [one["train_loss"] for one in curve.evaluations], color="0.5", label="training")
        pane.plot(epochs, [one["validation_loss"] for one in curve.evaluations], label="validation")
        pane.axvline(epoch, color="tab:green", linestyle=":", label="weights")
        pane.set(xlabel="epoch", title=words, ylim=(0.0, 0.8), xlim=(0, EPOCHS))
    panes[0].set_ylabel("cross-entropy")
    panes[0].legend(fontsize=8)
    header = ("with", "weights of epoch", "training loss", "validation loss", "gap")
    text = f"""An MLP with two layers of 512 units on 1,000 digits of 10 × 10 pixels, a constant rate, \
{EPOCHS} epochs at most; early stopping gives up after {PATIENCE}
epochs without a lower validation loss, and takes the weights of the best. Both losses are measured in evaluation mode
with the weights of that epoch.

{table(header, rows)}

The curves show the training loss as it is while training, which dropout raises."""
    holds = all(gaps[words] < gaps["neither"] for words in gaps if words != "neither")
    title = "Dropout and early stopping narrow the gap between training and validation"
    return Section(title, holds, text, (Picture("early_stopping.png", "Early stopping and dropout", png(figure)),))


def loss(network: Network, part: Part) -> float:
    """Mean cross-entropy."""
    vectors = torch.from_numpy(part.vectors().astype(np.float32))
    with torch.no_grad():
        return float(cross_entropy(network(vectors)["logits"], torch.from_numpy(part.targets)))


CLAIM = Claim("overfitting", measure, tuple(RUNS.values()))
