"""The rows of the comparison: every architecture and head, on a task that a simple model does less well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.architectures import baselines
from benchmarks.architectures.held_out import HeldOut
from benchmarks.architectures.runs import Run
from finetune.recipe import Data, Hyperparameters, Recipe
from models.spec import ModelSpec

# The baseline's metric on the same items.
Measure = Callable[[HeldOut], float]
SEED = 1
DIGITS = "MNIST digits, images of 32 × 32"
COLUMNS = "MNIST digits, column by column"
VECTORS = "MNIST digits, vectors"
# A small vocabulary: its tokens are a few letters, which tell languages apart better than words.
WORDS = {"vocabulary_size": 800, "embedding": 32, "max_length": 64}
LANGUAGES = "Django's messages in 18 languages"


@dataclass(frozen=True, kw_only=True)
class Row:
    """title, task, data, baseline: as the document says. metric: of the published network on the test items."""

    title: str
    run: Run
    task: str
    data: str
    metric: str
    better: Literal["more", "less"] = "more"
    baseline: str
    measure: Measure


def recipe(
    architecture: str,
    hyperparameters: dict[str, Any] | None = None,
    *,
    epochs: int,
    rate: float,
    batch: int = 32,
    seed: int = SEED,
    **sections: Any,
) -> Recipe:
    """A recipe with a test split, its model from random weights or, without hyper-parameters, the one of that name."""
    made = ModelSpec(architecture=architecture, hyperparameters=hyperparameters or {})
    return Recipe(
        model=architecture if hyperparameters is None else made,
        training_file="",
        seed=seed,
        hyperparameters=Hyperparameters(n_epochs=epochs, batch_size=batch, learning_rate=rate),
        **{"data": Data(test=0.2), **sections},
    )


def images(name: str, architecture: str, *, epochs: int, rate: float = 2e-3, title: str = "", **parameters: Any) -> Row:
    """A convolutional network that tells digits apart."""
    return Row(
        title=title or name,
        run=Run(
            name=name,
            file="digits.zip",
            recipe=recipe(architecture, {"image_size": 32, **parameters}, epochs=epochs, rate=rate),
        ),
        task="10 classes",
        data=DIGITS,
        metric="accuracy",
        baseline="logistic regression on pixels",
        measure=baselines.logistic,
    )


def columns(name: str, architecture: str, *, epochs: int, rate: float, title: str = "", **parameters: Any) -> Row:
    """A recurrent network that sees a digit as a series of its columns."""
    return Row(
        title=title or name,
        run=Run(
            name=name,
            file="digit-columns.jsonl",
            recipe=recipe(architecture, parameters, epochs=epochs, rate=rate),
        ),
        task="10 classes",
        data=COLUMNS,
        metric="accuracy",
        baseline="logistic regression on all steps",
        measure=baselines.steps,
    )


def texts(name: str, architecture: str, *, epochs: int, rate: float, title: str = "", **parameters: Any) -> Row:
    """A network that tells languages apart by tokens of its own."""
    return Row(
        title=title or name,
        run=Run(
            name=name,
            file="languages.csv",
            recipe=recipe(architecture, {**WORDS, **parameters}, epochs=epochs, rate=rate),
        ),
        task="18 languages",
        data=LANGUAGES,
        metric="accuracy",
        baseline="logistic regression on tf-idf of words",
        measure=baselines.words,
    )


ROWS: tuple[Row, ...] = (
    Row(
        title="mlp",
        run=Run(
            name="mlp",
            file="digit-vectors.csv",
            recipe=recipe("mlp", {"hidden": [256, 128], "dropout": 0.3}, epochs=15, rate=2e-3, batch=64),
        ),
        task="10 classes",
        data=VECTORS,
        metric="accuracy",
        baseline="logistic regression on pixels",
        measure=baselines.logistic,
    ),
    images("lenet5", "lenet5", epochs=6),
    images("alexnet", "alexnet", epochs=6, width=0.125, dropout=0.2),
    images("vgg11", "vgg", epochs=4, width=0.125, depth=11, title="vgg, 11 layers"),
    images("googlenet", "googlenet", epochs=3, width=0.125),
    images("inception-v3", "inception_v3", epochs=3, width=0.125, title="inception_v3"),
    images("resnet18", "resnet", epochs=3, width=0.125, title="resnet, 18 layers"),
    images("plain18", "resnet", epochs=3, width=0.125, skips=False, title="resnet without skips, 18 layers"),
    images("inception-resnet", "inception_resnet", epochs=3, width=0.125, repeats=(1, 2, 1), title="inception_resnet"),
    images("xception", "xception", epochs=4, width=0.125, repeats=2),
    images("mobilenet", "mobilenet", epochs=10, rate=4e-3, width=0.25),
    columns("rnn", "rnn", epochs=20, rate=2e-3, width=64),
    columns("lstm", "lstm", epochs=6, rate=4e-3, width=48),
    columns("gru", "gru", epochs=6, rate=4e-3, width=48),
    columns("gru-both", "gru", epochs=6, rate=4e-3, width=32, bidirectional=True, title="gru, both directions"),
    Row(
        title="convnet1d, series",
        run=Run(
            name="convnet1d-leaves",
            file="leaves.jsonl",
            recipe=recipe("convnet1d", {"width": 32}, epochs=40, rate=2e-3, batch=16),
        ),
        task="6 kinds of leaves",
        data="OSULeaf, 442 outlines",
        metric="accuracy",
        baseline="logistic regression on all steps",
        measure=baselines.steps,
    ),
    texts("convnet1d-words", "convnet1d", epochs=8, rate=3e-3, title="convnet1d, text", width=64),
)
