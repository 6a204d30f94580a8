"""Small real networks, data and a reporter for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from finetune import trainer
from finetune.automatic import Chosen
from finetune.objectives.cross_entropy import CrossEntropy
from finetune.objectives.objective import Objective
from finetune.preprocess import Items
from finetune.recipe import Recipe
from finetune.terms import Term
from models import registry
from models.network import Headed, Network, Normalize, Trunk
from models.spec import Classification, ModelSpec


class Recorder:
    """A reporter that keeps what it is told, and asks to stop from its `cancel_at`-th question on."""

    def __init__(self, cancel_at: int | None = None) -> None:
        self.cancel_at = cancel_at
        self.asked = 0
        self.states: list[str] = []
        self.events: list[tuple[str, str, str]] = []
        self.reports: list[dict[str, float | None]] = []
        self.checkpoints: list[tuple[int, Path]] = []

    def state(self, stage: str) -> None:
        self.states.append(stage)

    def event(
        self, message: str, *, level: str = "info", type: str = "message", data: dict[str, Any] | None = None
    ) -> None:
        self.events.append((level, type, message))

    def metrics(self, step: int, **values: float | None) -> None:
        self.reports.append({"step": step, **values})

    def checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        assert path.is_dir()
        self.checkpoints.append((step, path))

    def cancelled(self) -> bool:
        self.asked += 1
        return self.cancel_at is not None and self.asked >= self.cancel_at

    def messages(self) -> str:
        return "\n".join(message for _, _, message in self.events)


class SmallConvolutions(Trunk):
    """Two convolutions with batch norm and dropout: what a resumed or frozen run can get wrong."""

    input_names = ("pixels",)
    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        widths = (3, 8, 16)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.Dropout2d(0.1))
            for i, o in pairwise(widths)
        )

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [(f"stage{i}", stage) for i, stage in enumerate(self.stages)]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.normalize(pixels)
        for stage in self.stages:
            x = stage(x)
        return x.mean(dim=(2, 3))


class MeanOfEmbeddings(Trunk):
    """The smallest text encoder: the mean of the embeddings of the tokens that are there."""

    input_names = ("input_ids", "attention_mask")
    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(100, self.width)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [("embeddings", self.embeddings)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask.unsqueeze(-1).float()
        return (self.embeddings(input_ids) * kept).sum(dim=1) / kept.sum(dim=1)


def convolutions(classes: int = 10, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    spec = ModelSpec(architecture="efficientnet_lite0", task=Classification(classes))
    return Headed(spec, SmallConvolutions(), dropout=0.1)


def text_network(classes: int = 2, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Headed(ModelSpec(architecture="text_encoder", task=Classification(classes)), MeanOfEmbeddings(), dropout=0.0)


def mlp(features: int = 64, hidden: tuple[int, ...] = (32, 16), classes: int = 10, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    hyperparameters = {"features": features, "hidden": hidden}
    return registry.build(ModelSpec(architecture="mlp", hyperparameters=hyperparameters, task=Classification(classes)))


def digit_vectors(items: int = 400) -> Items:
    """The first of scikit-learn's 1,797 handwritten digits, 64 values from 0 to 1."""
    digits = load_digits()
    vectors = (digits.data[:items] / 16.0).astype(np.float32)
    targets = digits.target[:items].astype(np.int64)
    return Items(targets, None, np.arange(items), lambda rows: {"vector": vectors[rows]})


def digit_images(items: int = 200) -> Items:
    """The same as uint8 [items, 8, 8, 3]."""
    digits = load_digits()
    grey = (digits.images[:items] * 15.9).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    targets = digits.target[:items].astype(np.int64)
    return Items(targets, None, np.arange(items), lambda rows: {"pixels": pixels[rows]})


def fit(
    network: Network,
    items: Items,
    folder: Path,
    reporter: Recorder | None = None,
    *,
    chosen: Chosen,
    seed: int = 0,
    objective: Objective | None = None,
    terms: Sequence[Term] = (),
    held_out: int = 50,
    run: str = "run",
    **recipe: Any,
) -> trainer.FitResult:
    """trainer.fit with the last `held_out` items for validation; `recipe`: fields of the Recipe."""
    torch.set_num_threads(1)
    cut = len(items) - held_out
    return trainer.fit(
        network,
        items.select(np.arange(cut)),
        items.select(np.arange(cut, len(items))),
        objective or cross_entropy_of(network),
        Recipe(model="small", training_file="small", **{"checkpoint_seconds": 1e9, **recipe}),
        chosen,
        seed=seed,
        run=run,
        folder=folder,
        reporter=reporter or Recorder(),
        terms=terms,
    )


def cross_entropy_of(network: Network) -> CrossEntropy:
    assert isinstance(network, Headed)
    assert isinstance(network.head, nn.Linear)
    return CrossEntropy(network.head.out_features)


def weights(network: Network) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not the same in every bit."""
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}
