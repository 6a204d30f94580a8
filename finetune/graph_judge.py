"""How good an exported graph is on held-out items, by the metrics of the objective that its network has learned by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from export.bundle import Provider
from export.graph_session import opened
from export.processing.inputs import TextInput
from export.variants import Optimization
from finetune import recipe
from finetune.evaluate import evaluate, report
from finetune.lesson import Lesson
from finetune.material import Material
from finetune.preprocess import Items
from models.network import Network

# Items that ranges are measured on, and the batches that they come in.
CALIBRATION, CALIBRATION_BATCH = 256, 32
# Rows that graphs are timed with.
TIMED = 8


class GraphNetwork(nn.Module):
    """model.onnx in the place of the network that it was exported from: tensors in, tensors by name out."""

    def __init__(self, path: Path, provider: Provider) -> None:
        super().__init__()
        self.session = opened(path, provider)
        self.names = [tensor.name for tensor in self.session.get_inputs()]
        self.answers = [tensor.name for tensor in self.session.get_outputs()]
        self.where = nn.Parameter(torch.empty(0), requires_grad=False)  # the host, for those who ask

    def forward(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        given = {name: value.numpy() for name, value in zip(self.names, inputs, strict=True)}
        found = self.session.run(self.answers, given)
        return {name: torch.from_numpy(value) for name, value in zip(self.answers, found, strict=True)}


def optimization(wanted: recipe.Optimization, lesson: Lesson, material: Material, held_out: Items) -> Optimization:
    """held_out: items to judge on, by the objective's metrics; without r2, which follows from the error, and may be
    near 0."""

    def judge(path: Path, provider: Provider) -> dict[str, float]:
        network = cast(Network, GraphNetwork(path, provider))
        measured = evaluate(network, held_out, lesson.objective, 2 * lesson.chosen.batch_size, lesson.check)
        found = report(measured, held_out, lesson.objective).figures()
        return {name: found[name] for name in lesson.objective.metrics if name.split(".")[-1] != "r2"}

    train = material.train
    rows = np.random.default_rng(0).permutation(len(train))[:CALIBRATION]
    return Optimization(
        precisions=wanted.precisions,
        most_loss=wanted.most_loss,
        judge=judge,
        falling=lesson.objective.falling,
        calibration=[
            train.batch(rows[start : start + CALIBRATION_BATCH]) for start in range(0, len(rows), CALIBRATION_BATCH)
        ],
        sample=held_out.batch(np.arange(min(TIMED, len(held_out)))),
        text=isinstance(material.reading.input, TextInput),
    )
