"""The rows of the comparison: every architecture and head, on a task that a simple model does less well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec

from benchmarks.architectures import baselines
from benchmarks.architectures.held_out import HeldOut
from benchmarks.architectures.runs import Run
from finetune.recipe import (
    Adversarial,
    Bagging,
    BinaryCrossEntropy,
    CrossEntropy,
    Data,
    Elbo,
    Ensemble,
    Gaussian,
    Head,
    Hyperparameters,
    L1Sparsity,
    MaskedTokens,
    McDropout,
    MultiLabel,
    MultiTask,
    Objective,
    Recipe,
    Reconstruction,
    SquaredError,
    Stopping,
    Transfer,
)
from models.spec import ModelSpec

# The baseline's metric on the same items.
Measure = Callable[[HeldOut], float]


@dataclass(frozen=True)
class Figure:
    """A figure that a run has measured on the same items: the row's own run, or another."""

    name: str
    run: Run | None = None


SEED = 1
DIGITS = "MNIST digits, images of 32 × 32"
CLOTHES = "Fashion-MNIST, 10,000 images of 32 × 32"
COLUMNS = "MNIST digits, column by column"
VECTORS = "MNIST digits, vectors"
# A small vocabulary: its tokens are a few letters, which tell languages apart better than words.
WORDS = {"vocabulary_size": 800, "embedding": 32, "max_length": 64}
# Numbers that an autoencoder packs an image into.
CODE = 16
LANGUAGES = "Django's messages in 18 languages"


@dataclass(frozen=True, kw_only=True)
class Row:
    """title, task, data, baseline: as the document says. metric: of the published network on the test items. also: a
    better simple model that the document mentions, by name; to be behind it is no failure."""

    title: str
    run: Run
    task: str
    data: str
    metric: str
    better: Literal["more", "less"] = "more"
    baseline: str
    measure: Measure | Figure
    also: tuple[str, Measure | Figure] | None = None

    def runs(self) -> list[Run]:
        """Its own, and those that it is compared with."""
        references = [self.measure, *([self.also[1]] if self.also else [])]
        return [self.run, *(one.run for one in references if isinstance(one, Figure) and one.run is not None)]


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


def images(
    name: str,
    architecture: str,
    *,
    epochs: int,
    rate: float = 2e-3,
    title: str = "",
    file: str = "digits.zip",
    data: str = DIGITS,
    **parameters: Any,
) -> Row:
    """A convolutional network that tells digits apart, or the classes of another `file`."""
    return Row(
        title=title or name,
        run=Run(
            name=name,
            file=file,
            recipe=recipe(architecture, {"image_size": 32, **parameters}, epochs=epochs, rate=rate),
        ),
        task="10 classes",
        data=data,
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


def autoencoder(
    name: str,
    *,
    title: str,
    epochs: int,
    rate: float,
    architecture: str = "autoencoder",
    objective: Objective | None = None,
    components: int = CODE,
    **parameters: Any,
) -> Row:
    """A network that packs a digit into CODE numbers, or what the `parameters` say."""
    size = {"image_size": 28, "channels": (), **({"code": CODE} if architecture == "autoencoder" else {})}
    return Row(
        title=title,
        run=Run(
            name=name,
            file="digits.zip",
            recipe=recipe(architecture, {**size, **parameters}, epochs=epochs, rate=rate, objective=objective),
        ),
        task=f"the image again from {CODE} numbers",
        data="MNIST digits, images of 28 × 28",
        metric="explained_variance",
        baseline=f"PCA, {components} components",
        measure=partial(baselines.principal_components, code=components),
    )


def adversaries(name: str, *, title: str, epochs: int, rate: float, **parameters: Any) -> Row:
    """A generator and a discriminator; published are the weights whose images come nearest to the validation items."""
    made = recipe(
        "gan",
        {"latent": 32, "width": 16, **parameters},
        epochs=epochs,
        rate=rate,
        objective=Adversarial(),
        stopping=Stopping(metric="frechet_distance", patience=epochs),
    )
    return Row(
        title=title,
        run=Run(name=name, file="digits.zip", recipe=made),
        task="images from nothing",
        data=DIGITS,
        metric="frechet_distance",
        better="less",
        baseline="independent pixels of the right mean and deviation",
        measure=Figure("frechet_independent"),
    )


def translator(name: str, architecture: str, *, title: str, epochs: int, rate: float, **parameters: Any) -> Row:
    """A network that writes Italian."""
    sizes = {"vocabulary_size": 1500, "max_length": 48, "dropout": 0.1, **parameters}
    made = recipe(architecture, sizes, epochs=epochs, rate=rate, data=Data(test=0.15), max_length=48)
    return Row(
        title=title,
        run=Run(name=name, file="translations.csv", recipe=made),
        task="translation into Italian",
        data="Django's messages in English, Spanish, Portuguese, Catalan and Galician",
        metric="chrf",
        baseline="the source as it is",
        measure=baselines.copy_of_source,
    )


def perceptron(
    name: str,
    *,
    title: str,
    task: str,
    metric: str,
    baseline: tuple[str, Measure],
    label: str = "label",
    objective: Objective | None = None,
    better: Literal["more", "less"] = "more",
) -> Row:
    """An MLP with a head of some kind on digits as vectors, in a file of its own."""
    return Row(
        title=title,
        run=Run(
            name=name,
            file=f"digit-{name.removeprefix('mlp-')}.csv",
            recipe=recipe(
                "mlp",
                {"hidden": [256], "dropout": 0.3},
                epochs=15,
                rate=2e-3,
                batch=64,
                objective=objective,
                data=Data(test=0.2, label_column=label),
            ),
        ),
        task=task,
        data=VECTORS,
        metric=metric,
        better=better,
        baseline=baseline[0],
        measure=baseline[1],
    )


TRANSFORMER = {"vocabulary_size": 1500, "layers": 2, "heads": 4, "width": 64}
RNN = {"embedding": 64, "width": 96}
ENCODER = ModelSpec(architecture="transformer_encoder", hyperparameters=TRANSFORMER)
MASKED = Run(
    name="masked",
    file="languages.csv",
    recipe=recipe("transformer_encoder", TRANSFORMER, epochs=20, rate=2e-3, max_length=64, objective=MaskedTokens()),
)


def few_labels(name: str, model: str | ModelSpec, needs: tuple[str, ...] = ()) -> Run:
    """An encoder that tells languages apart, from random weights or from a published model."""
    made = recipe("", None, epochs=25, rate=1e-3, data=Data(test=0.6), objective=CrossEntropy(), max_length=64)
    return Run(name=name, file="other-languages.csv", recipe=msgspec.structs.replace(made, model=model), needs=needs)


PERCEPTRON = perceptron(
    "mlp-vectors",
    title="mlp, softmax",
    task="10 classes",
    metric="accuracy",
    baseline=("logistic regression on pixels", baselines.logistic),
)


def several(name: str, ensemble: Ensemble) -> Run:
    """The same network, as several or in several passes."""
    return Run(
        name=name,
        file=PERCEPTRON.run.file,
        recipe=msgspec.structs.replace(PERCEPTRON.run.recipe, ensemble=ensemble),
    )


ROWS: tuple[Row, ...] = (
    PERCEPTRON,
    perceptron(
        "mlp-parity",
        title="mlp, one sigmoid",
        task="odd or even",
        metric="accuracy",
        label="parity",
        objective=BinaryCrossEntropy(),
        baseline=("logistic regression on pixels", baselines.logistic),
    ),
    perceptron(
        "mlp-words",
        title="mlp, sigmoids",
        task="set of 5 labels",
        metric="macro_f1",
        label="words",
        objective=MultiLabel(),
        baseline=("logistic regression for each label", baselines.logistic_of_each_label),
    ),
    perceptron(
        "mlp-aspect",
        title="mlp, squared error",
        task="width over height of a digit",
        metric="r2",
        label="aspect",
        objective=SquaredError(),
        baseline=("ridge regression", baselines.ridge),
    ),
    Row(
        title="mlp, Gaussian",
        run=Run(
            name="mlp-diabetes",
            file="diabetes.csv",
            recipe=recipe(
                "mlp",
                {"hidden": [32], "dropout": 0.3, "activation": "tanh"},
                epochs=40,
                rate=1e-3,
                batch=16,
                objective=Gaussian(),
            ),
        ),
        task="progress of a disease, with its deviation",
        data="diabetes, 442 patients",
        metric="r2",
        baseline="the mean",
        measure=baselines.mean,
        also=("ridge regression", baselines.ridge),
    ),
    perceptron(
        "mlp-tasks",
        title="mlp, three heads",
        task="digit, parity and aspect at once",
        metric="digit.accuracy",
        objective=MultiTask(
            heads={
                "digit": Head(),
                "parity": Head(objective=BinaryCrossEntropy()),
                "aspect": Head(objective=SquaredError()),
            }
        ),
        baseline=("logistic regression on pixels, digit alone", baselines.logistic_of_first),
    ),
    Row(
        title="ensemble of 5 mlp",
        run=several("ensemble", Bagging(members=5, bootstrap=False)),
        task="10 classes",
        data=VECTORS,
        metric="loss",
        better="less",
        baseline="one such network",
        measure=Figure("loss", PERCEPTRON.run),
    ),
    Row(
        title="mlp, Monte-Carlo dropout",
        run=several("dropout", McDropout(passes=32)),
        task="10 classes",
        data=VECTORS,
        metric="accuracy",
        baseline="logistic regression on pixels",
        measure=baselines.logistic,
        also=("one pass without dropout", Figure("accuracy", PERCEPTRON.run)),
    ),
    images("lenet5", "lenet5", epochs=6),
    images("lenet5-fashion", "lenet5", epochs=10, title="lenet5 on clothes", file="fashion.zip", data=CLOTHES),
    images("alexnet", "alexnet", epochs=6, width=0.125, dropout=0.2),
    images("vgg11", "vgg", epochs=4, width=0.125, depth=11, title="vgg, 11 layers"),
    images("googlenet", "googlenet", epochs=3, width=0.125),
    images("inception-v3", "inception_v3", epochs=7, width=0.125, title="inception_v3"),
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
    autoencoder("linear", title="autoencoder, linear", epochs=40, rate=2e-3, components=CODE - 1, hidden=()),
    autoencoder("dense", title="autoencoder, dense", epochs=25, rate=1e-3, hidden=(256,)),
    autoencoder("convolutional", title="autoencoder, convolutional", epochs=12, rate=2e-3, channels=(8, 16)),
    autoencoder(
        "denoising",
        title="autoencoder, denoising",
        epochs=25,
        rate=1e-3,
        hidden=(256,),
        objective=Reconstruction(noise=0.1),
    ),
    autoencoder(
        "sparse",
        title="autoencoder, sparse",
        epochs=25,
        rate=1e-3,
        hidden=(256,),
        objective=Reconstruction(sparsity=L1Sparsity(weight=1e-5)),
    ),
    autoencoder(
        "contractive",
        title="autoencoder, contractive",
        epochs=12,
        rate=1e-3,
        hidden=(256,),
        objective=Reconstruction(contraction=1e-5),
    ),
    autoencoder(
        "vae", title="vae", architecture="vae", epochs=25, rate=1e-3, hidden=(256,), latent=CODE, objective=Elbo()
    ),
    adversaries("gan", title="gan, dense", epochs=30, rate=1e-3, layers="dense"),
    adversaries("dcgan", title="gan, convolutional", epochs=15, rate=1e-3),
    translator("seq2seq", "seq2seq", title="seq2seq without attention", epochs=25, rate=3e-3, attention="none", **RNN),
    translator("seq2seq-attention", "seq2seq", title="seq2seq with attention", epochs=25, rate=3e-3, **RNN),
    translator("transformer", "transformer", title="transformer", epochs=20, rate=1e-3, **TRANSFORMER),
    Row(
        title="transformer_encoder, pre-training",
        run=MASKED,
        task="hidden tokens, without labels",
        data=LANGUAGES,
        metric="perplexity",
        better="less",
        baseline="unigram",
        measure=Figure("unigram_perplexity"),
    ),
    Row(
        title="transformer_encoder, few labels",
        run=few_labels("few-labels", "masked", needs=("masked",)),
        task="18 languages",
        data="other messages of Django's, about 20 with a label for each language",
        metric="accuracy",
        baseline="logistic regression on tf-idf of words",
        measure=baselines.words,
        also=("from random weights", Figure("accuracy", few_labels("few-labels-scratch", ENCODER))),
    ),
    Row(
        title="transformer_decoder",
        run=Run(
            name="decoder",
            file="languages.csv",
            recipe=recipe("transformer_decoder", TRANSFORMER, epochs=12, rate=2e-3, max_length=64),
        ),
        task="the next token",
        data=LANGUAGES,
        metric="perplexity",
        better="less",
        baseline="unigram",
        measure=Figure("unigram_perplexity"),
    ),
    texts("convnet1d-words", "convnet1d", epochs=8, rate=3e-3, title="convnet1d, text", width=64),
    Row(
        title="efficientnet_lite0, pre-trained",
        run=Run(
            name="efficientnet",
            file="few-digits.zip",
            recipe=recipe("efficientnet-lite0", epochs=10, rate=1e-3, batch=16, image_size=64),
        ),
        task="10 classes",
        data="500 MNIST digits, images of 64 × 64",
        metric="accuracy",
        baseline="logistic regression on pixels",
        measure=baselines.logistic,
    ),
    Row(
        title="minilm, pre-trained, trunk frozen",
        run=Run(
            name="minilm",
            file="applications.csv",
            recipe=recipe(
                "minilm-l6-v2",
                epochs=12,
                rate=5e-3,
                batch=16,
                max_length=48,
                data=Data(test=0.3),
                transfer=Transfer(freeze="all"),
            ),
        ),
        task="4 applications of Django",
        data="433 messages in English",
        metric="accuracy",
        baseline="logistic regression on tf-idf of words",
        measure=baselines.words,
    ),
)
