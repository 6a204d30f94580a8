"""The adversarial game: its losses, whose turn it is, and what comes of it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from export import bundle
from export.processing.inputs import ImageInput, LatentInput
from finetune import automatic
from finetune.admission import Refused, admit
from finetune.automatic import Chosen
from finetune.data.validation import inspect
from finetune.evaluate import evaluate, report
from finetune.objectives.adversarial import Adversarial
from finetune.recipe import (
    AdaGrad,
    Adam,
    AdamW,
    Augmentation,
    ConfidencePenalty,
    Hyperparameters,
    Optimizer,
    Recipe,
    Regularization,
    RmsProp,
    Schedule,
    Sgd,
    Stopping,
    Transfer,
)
from finetune.recipe import Adversarial as Section
from finetune.run import run
from finetune.run_request import Cancelled, JobFailed
from models.spec import ModelSpec
from tests.finetune.adversaries import HELD_OUT, digit, digits, gan, play
from tests.finetune.small import Recorder, differing, weights
from tests.finetune.test_run import file, request

CONSTANT = Schedule(warmup=0.0, decay="constant")


def test_the_losses_are_those_of_the_paper() -> None:
    """-log D(x) - log(1 - D(G(z))), -log D(G(z)) and log(1 - D(G(z))), and their gradients, by hand."""
    real = torch.tensor([2.0, -1.0, 0.0], requires_grad=True)
    made = torch.tensor([-3.0, 0.5, 1.0], requires_grad=True)
    p, q = torch.sigmoid(real), torch.sigmoid(made)
    targets = torch.zeros(3)

    loss = Adversarial(Section()).loss({"real": real, "generated": made}, targets)
    torch.testing.assert_close(loss, (-p.log() - (1 - q).log()).sum())
    torch.testing.assert_close(torch.autograd.grad(loss, (real, made)), (p - 1, q))

    smooth = Adversarial(Section(label_smoothing=0.1)).loss({"real": real, "generated": made}, targets)
    torch.testing.assert_close(smooth, (-0.9 * p.log() - 0.1 * (1 - p).log() - (1 - q).log()).sum())
    torch.testing.assert_close(torch.autograd.grad(smooth, (real, made)), (p - 0.9, q))

    loss = Adversarial(Section()).loss({"fooled": made}, targets)
    torch.testing.assert_close(loss, -q.log().sum())
    torch.testing.assert_close(torch.autograd.grad(loss, made)[0], q - 1)
    minimax = Adversarial(Section(generator_loss="minimax")).loss({"fooled": made}, targets)
    torch.testing.assert_close(minimax, (1 - q).log().sum())
    torch.testing.assert_close(torch.autograd.grad(minimax, made)[0], -q)

    both = {"real": real, "generated": made, "fooled": made}
    rounds = Adversarial(Section(discriminator_steps=3)).loss(both, targets)
    torch.testing.assert_close(rounds, (3 * (-p.log() - (1 - q).log()).sum() - q.log().sum()) / 4)
    huge = Adversarial(Section()).loss({"real": torch.tensor([-1e4]), "generated": torch.tensor([1e4])}, targets)
    assert float(huge) == pytest.approx(2e4)


OPTIMIZERS = [
    Adam(beta1=0.5, weight_decay=0.1),
    AdamW(weight_decay=0.5),
    Sgd(momentum=0.9, weight_decay=0.1),
    RmsProp(momentum=0.5, weight_decay=0.1),
    AdaGrad(weight_decay=0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
def test_a_step_moves_one_player_and_the_other_not_in_a_single_bit(optimizer: Optimizer, tmp_path: Path) -> None:
    """With momentum, weight decay and L1 in play, which all would go on pulling at weights without a gradient."""
    items, k = digits(60 + HELD_OUT), 2
    network, states = gan(items, width=4), []

    class Watching(Recorder):
        def cancelled(self) -> bool:
            if network.training:
                states.append(weights(network))
            return False

    play(
        network,
        items,
        tmp_path,
        Watching(),
        chosen=Chosen(epochs=3, batch_size=15, learning_rate=0.01),
        section=Section(discriminator_steps=k),
        optimizer=optimizer,
        regularization=Regularization(l1=1e-3, weight_noise=0.01),
    )
    # Before each of the 12 steps, but for those that an evaluation came before: it leaves the training mode.
    moves = [differing(before, after) for before, after in pairwise(states)]
    movers = ["/".join(sorted({name.partition(".")[0] for name in names})) for names in moves]
    assert len(movers) >= 8
    assert movers == (["discriminator"] * k + ["generator"]) * (len(movers) // (k + 1)) + ["discriminator"] * (
        len(movers) % (k + 1)
    )


@pytest.mark.parametrize("k", [1, 3])
def test_the_turns_are_counted(k: int) -> None:
    objective = Adversarial(Section(discriminator_steps=k))
    turns = [objective.half(step) for step in range(2 * (k + 1))]
    assert turns == (["discriminator"] * k + ["generator"]) * 2


@pytest.mark.parametrize(
    ("layers", "chosen", "optimizer"),
    [
        ("convolutional", Chosen(epochs=40, batch_size=24, learning_rate=2e-3), Adam(beta1=0.5)),
        pytest.param(
            "dense", Chosen(epochs=80, batch_size=24, learning_rate=0.05), Sgd(momentum=0.5), marks=pytest.mark.slow
        ),
    ],
)
def test_the_generator_comes_near_the_data(layers: str, chosen: Chosen, optimizer: Optimizer, tmp_path: Path) -> None:
    items = digits(300)
    network, objective = gan(items, layers=layers), Adversarial(Section())
    held_out = items.select(np.arange(240, 300))

    def measured() -> Any:
        return report(evaluate(network, held_out, objective, 32, lambda: None), held_out, objective)

    before = measured()
    result = play(network, items, tmp_path, chosen=chosen, optimizer=optimizer, schedule=CONSTANT)
    after = measured()
    assert after.frechet_distance < 0.6 * before.frechet_distance
    assert result.steps == result.best_step, "the last weights are kept"
    assert result.best_metrics["frechet_distance"] == pytest.approx(after.frechet_distance, rel=1e-4)
    norms = [set(point.norms) for point in result.gradient_norms]
    assert {name for names in norms for name in names} == {name for name, _ in network.blocks()}
    assert all(len({name.partition(".")[0] for name in names}) == 1 for names in norms)
    assert 0.3 < np.mean([next(iter(names)).startswith("generator") for names in norms]) < 0.7


def test_an_interrupted_game_ends_with_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    items = digits(60 + HELD_OUT)
    fields: dict[str, Any] = {
        "chosen": Chosen(epochs=3, batch_size=8, learning_rate=1e-3),
        "section": Section(discriminator_steps=2),
        "gradient_accumulation": 2,
        "checkpoint_seconds": 0.0,
        "optimizer": Adam(beta1=0.5),
        "regularization": Regularization(weight_noise=0.01),
    }
    undisturbed = gan(items)
    expected = play(undisturbed, items, tmp_path / "whole", **fields)
    for seed, question in enumerate((2, 4, 6)):
        with pytest.raises(Cancelled):
            play(gan(items, seed=seed), items, tmp_path / "parts", Recorder(question), **fields)
    network = gan(items, seed=9)
    found = play(network, items, tmp_path / "parts", **fields)
    assert differing(weights(undisturbed), weights(network)) == set()
    assert found == expected


def test_an_evaluation_draws_the_same_images_each_time_and_disturbs_nothing() -> None:
    items, objective = digits(64), Adversarial(Section())
    network = gan(items)
    torch.manual_seed(5)
    first = evaluate(network, items, objective, 16, lambda: None)
    drawn = torch.rand(1)
    second = evaluate(network, items, objective, 16, lambda: None)
    assert first.loss == second.loss
    for name, value in first.kept.items():
        np.testing.assert_array_equal(value, second.kept[name])
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    images = first.kept["image"]
    assert len(np.unique(images, axis=0)) == 64, "no two batches are held against the same images"


def test_stopping_watches_the_distance(tmp_path: Path) -> None:
    items = digits(60 + HELD_OUT)
    result = play(
        gan(items),
        items,
        tmp_path,
        chosen=Chosen(epochs=12, batch_size=30, learning_rate=1e-6),
        schedule=CONSTANT,
        stopping=Stopping(metric="frechet_distance", patience=2, min_delta=1.0),
    )
    assert result.steps == 3 * 2 < result.planned
    distances = [point["validation_frechet_distance"] for point in result.evaluations]
    assert result.best_metrics["frechet_distance"] == min(distances)


@pytest.mark.slow
def test_two_processes_play_the_same_game(tmp_path: Path) -> None:
    """Where a step leaves half of the network without gradients, no process waits for the other for ever."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module"]
    subprocess.run(
        [sys.executable, "-m", *launch, "tests.finetune.adversaries", str(tmp_path)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    one, other = (load_file(tmp_path / f"{process}-of-2.safetensors") for process in (0, 1))
    assert {name for name in differing(one, other) if "running" not in name} == set()
    moved = differing(weights(gan(digits(140))), one)
    assert {name.partition(".")[0] for name in moved} == {"generator", "discriminator"}


def zipped(path: Path, folders: bool, items: int = 90) -> Path:
    """Digits as PNG files, in class folders or beside each other."""
    data = load_digits()
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(items):
            stream = io.BytesIO()
            digit(data.images[i]).save(stream, "PNG")
            archive.writestr(f"{data.target[i]}/{i}.png" if folders else f"{i}.png", stream.getvalue())
    return path


SMALL = ModelSpec(architecture="gan", hyperparameters={"width": 4, "latent": 6})
SHORT = Hyperparameters(n_epochs=2, batch_size=16, learning_rate=1e-3)


def test_from_images_without_labels_to_a_bundle_that_makes_images_and_learns_on(tmp_path: Path) -> None:
    training, reporter = file(zipped(tmp_path / "digits.zip", folders=False)), Recorder()
    fields: dict[str, Any] = {"model": SMALL, "image_size": 16, "hyperparameters": SHORT}
    manifest = run(request(tmp_path, training, **fields), reporter)

    folder = tmp_path / "repository" / "model" / "1"
    assert bundle.verify(folder) == manifest
    images = ImageInput(height=16, width=16, resize="stretch", crop_fraction=1.0)
    assert manifest.input == LatentInput(size=6, images=images)
    assert (manifest.task, manifest.labels) == ("generation", [])
    assert manifest.metrics["frechet_distance"] > manifest.metrics["frechet_held_out"]
    assert "gan learns to make images from 81 items" in reporter.messages()
    assert manifest.lineage.recipe is not None
    assert manifest.lineage.recipe["optimizer"] == msgspec.to_builtins(Adam(beta1=0.5))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (image,) = session.run(["image"], {"latent": np.zeros((3, 6), np.float32)})
    assert image.shape == (3, 16, 16, 3)
    card = (folder / "MODEL_CARD.md").read_text()
    assert "a generator of images" in card
    assert "/v1/images/generations" in card
    assert (folder / "evaluation.png").stat().st_size > 10_000

    # Training goes on with both players as they were, from class folders whose names say nothing.
    labelled = file(zipped(tmp_path / "labelled.zip", folders=True))
    further = {"model": "model", "hyperparameters": msgspec.structs.replace(SHORT, n_epochs=1, learning_rate=1e-9)}
    again = run(request(tmp_path, labelled, job_id="job-2", **further), Recorder())
    assert again.version == 2
    assert again.input == manifest.input
    assert again.lineage.base_model == "model:1"
    first, second = (load_file(tmp_path / "repository" / "model" / v / "weights.safetensors") for v in ("1", "2"))
    for name in (name for name in first if name.endswith("weight") or name.startswith("space.")):
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-5)
    assert any(name.startswith("discriminator.") for name in second)

    with pytest.raises(JobFailed, match="model:1 makes images of 16 pixels a side, not 32"):
        run(request(tmp_path, training, name="larger", job_id="job-3", model="model:1", image_size=32), Recorder())


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"transfer": Transfer(freeze="generator.latent")}, "transfer.freeze", "learns as a whole"),
        ({"augmentation": Augmentation(mixup=0.2)}, "augmentation.mixup", "mixed images"),
        ({"augmentation": Augmentation(cutmix=0.2)}, "augmentation.cutmix", "mixed images"),
        ({"terms": (ConfidencePenalty(),)}, "terms", "no head"),
        ({"stopping": Stopping()}, "stopping.metric", "take frechet_distance"),
        (
            {"stopping": Stopping(metric="frechet_distance", retrain="continue")},
            "stopping.retrain",
            "take scratch",
        ),
        ({"schedule": Schedule(decay="plateau")}, "schedule.decay", "does not tell how good"),
    ],
)
def test_what_makes_no_sense_in_a_game_is_refused_at_once(
    fields: dict[str, Any], param: str, words: str, tmp_path: Path
) -> None:
    path = zipped(tmp_path / "digits.zip", folders=False, items=20)
    found = inspect(path, path.name)
    given: dict[str, Any] = {"backbones": {}, "repository": tmp_path / "none", "allow_hub": False, "report": found}
    assert admit(Recipe(model="gan", training_file="x"), **given) == "gan"
    with pytest.raises(Refused, match=words) as refused:
        admit(Recipe(model="gan", training_file="x", **fields), **given)
    assert refused.value.param == param
    with pytest.raises(JobFailed, match=words):
        run(request(tmp_path, file(path), **{"model": SMALL, **fields}), Recorder())


def test_what_is_chosen_for_a_game() -> None:
    given = Recipe(model="gan", training_file="x")
    found = automatic.choose(given, "image", 10_000, beginning="random", adversarial=True)
    assert found == Chosen(epochs=20, batch_size=32, learning_rate=2e-4, optimizer=Adam(beta1=0.5))
    assert automatic.choose(given, "image", 10_000, beginning="random").optimizer == AdamW()
