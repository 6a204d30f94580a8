"""The documented rules behind "auto"."""

from __future__ import annotations

import pytest
import torch

from finetune import automatic
from finetune.recipe import Hyperparameters, Method, Recipe, Sgd, Supervised, Transfer
from models.catalog import Modality


def recipe(**fields: object) -> Recipe:
    return Recipe(model="mlp", training_file="data.csv", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modality", "items", "expected"),
    [
        ("image", 50, 8),  # never below 8
        ("image", 330, 16),  # the largest power of two that leaves 20 steps
        ("image", 4_000, 32),
        ("image", 1_000_000, 32),
        ("text", 1_000_000, 32),
        ("vector", 1_000_000, 256),
    ],
)
def test_batch_size(modality: Modality, items: int, expected: int) -> None:
    assert automatic.batch_size(modality, items) == expected


def test_learning_rate_follows_what_is_trained() -> None:
    assert automatic.learning_rate("text", "adamw", step_items=32, beginning="backbone", head_only=False) == 5e-5
    assert automatic.learning_rate("image", "adamw", step_items=32, beginning="backbone", head_only=False) == 5e-4
    assert automatic.learning_rate("image", "adamw", step_items=32, beginning="random", head_only=False) == 1e-3
    assert automatic.learning_rate("text", "adamw", step_items=32, beginning="learned", head_only=False) == 5e-4
    assert automatic.learning_rate("text", "adamw", step_items=32, beginning="backbone", head_only=True) == 5e-3


def test_learning_rate_grows_with_the_step_as_its_optimizer_asks() -> None:
    def rate(optimizer: str, items: int) -> float:
        return automatic.learning_rate("image", optimizer, step_items=items, beginning="backbone", head_only=False)  # type: ignore[arg-type]

    assert rate("adamw", 128) == pytest.approx(2 * rate("adamw", 32))
    assert rate("sgd", 128) == pytest.approx(4 * rate("sgd", 32))


def test_epochs() -> None:
    assert automatic.epochs(100, 8, beginning="backbone") == 10  # small data: the most
    assert automatic.epochs(8_000, 32, beginning="backbone") == 4  # 250 steps each, 1,000 wanted
    assert automatic.epochs(200_000, 32, beginning="backbone") == 2  # large data: the least
    assert automatic.epochs(800_000, 32, beginning="backbone") == 1  # two epochs would be 50,000 steps
    assert automatic.epochs(1_000, 32, beginning="random") == 94
    assert automatic.epochs(1_000, 32, beginning="learned") == 32
    assert automatic.epochs(50, 8, beginning="learned") == 100  # a small network learns from a few items, in time


def test_a_causal_decoder_has_rules_of_its_own() -> None:
    def chosen(items: int, beginning: automatic.Beginning = "backbone", **fields: object) -> automatic.Chosen:
        return automatic.choose(recipe(**fields), "text", items, beginning=beginning, architecture="causal_decoder")

    assert chosen(100) == automatic.Chosen(epochs=4, batch_size=8, learning_rate=pytest.approx(5e-5))
    assert chosen(16_000) == automatic.Chosen(epochs=2, batch_size=32, learning_rate=1e-4)
    half = Method(supervised=Supervised(hyperparameters=Hyperparameters(learning_rate_multiplier=0.5, n_epochs=1)))
    assert chosen(16_000, method=half) == automatic.Chosen(epochs=1, batch_size=32, learning_rate=5e-5)
    assert chosen(16_000, "random").learning_rate == 1e-3, "without weights it is a network like any other"


def test_choose_fills_in_only_what_is_open() -> None:
    given = Hyperparameters(n_epochs=3, batch_size=7, learning_rate=0.25)
    assert automatic.choose(recipe(hyperparameters=given), "image", 1_000, beginning="backbone") == automatic.Chosen(
        epochs=3, batch_size=7, learning_rate=0.25
    )
    open_ones = automatic.choose(recipe(), "image", 8_000, beginning="backbone")
    assert open_ones == automatic.Chosen(epochs=4, batch_size=32, learning_rate=5e-4)


@pytest.mark.parametrize(("architecture", "rate"), [("seq2seq", 4e-3), ("transformer", 1e-3)])
def test_a_translation_takes_more_steps_from_random_weights(architecture: str, rate: float) -> None:
    begun = automatic.choose(recipe(), "text", 10_000, beginning="random", architecture=architecture)
    assert begun == automatic.Chosen(epochs=32, batch_size=32, learning_rate=rate), "10,000 steps, 313 an epoch"
    gone_on = automatic.choose(recipe(), "text", 10_000, beginning="learned", architecture=architecture)
    assert gone_on == automatic.Chosen(epochs=4, batch_size=32, learning_rate=5e-4)


def test_multiplier_scales_the_automatic_rate_wherever_the_hyperparameters_are() -> None:
    thrice = Method(supervised=Supervised(hyperparameters=Hyperparameters(learning_rate_multiplier=3.0)))
    assert automatic.choose(recipe(method=thrice), "image", 8_000, beginning="backbone").learning_rate == pytest.approx(
        1.5e-3
    )
    both = Hyperparameters(learning_rate_multiplier=3.0, learning_rate=0.1)
    with pytest.raises(ValueError, match="give one of them"):
        automatic.choose(recipe(hyperparameters=both), "image", 8_000, beginning="backbone")


def test_accumulation_optimizer_and_freezing_enter_the_automatic_rate() -> None:
    def rate(**fields: object) -> float:
        return automatic.choose(recipe(**fields), "image", 8_000, beginning="backbone").learning_rate

    assert rate(gradient_accumulation=4) == pytest.approx(2 * rate())
    assert rate(optimizer=Sgd()) == pytest.approx(20 * rate())
    assert rate(transfer=Transfer(freeze="all")) == pytest.approx(5e-3)
    assert rate(transfer=Transfer(train_last=0)) == pytest.approx(5e-3)
    assert rate(transfer=Transfer(train_last=1)) == pytest.approx(5e-4)
    assert rate(transfer=Transfer(freeze="all", unfreeze_epoch=1)) == pytest.approx(5e-4)


def test_precision_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert automatic.precision("auto", cpu) == "no"
    assert automatic.precision("bfloat16", cpu) == "bf16"
    with pytest.raises(ValueError, match="float16 needs a CUDA device"):
        automatic.precision("float16", cpu)
