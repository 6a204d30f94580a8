"""The training loop: what it promises, on small networks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune import trainer
from finetune.automatic import Chosen
from finetune.batches import steps_in_epoch, training_order
from finetune.checkpoint import Progress
from finetune.evaluate import evaluate
from finetune.objectives.cross_entropy import CrossEntropy
from finetune.preprocess import Items
from finetune.recipe import (
    AdaGrad,
    Adam,
    AdamW,
    Augmentation,
    Optimizer,
    Regularization,
    RmsProp,
    Schedule,
    Sgd,
    Stopping,
    Transfer,
)
from finetune.run_request import Cancelled, JobFailed
from models import registry
from models.spec import Classification, ModelSpec
from tests.finetune.one_of_several import train
from tests.finetune.small import (
    Recorder,
    convolutions,
    differing,
    digit_images,
    digit_vectors,
    fit,
    mlp,
    text_network,
    weights,
)

CONSTANT = Schedule(warmup=0.0, decay="constant")


METHODS = {
    "augmentation": Augmentation(rotation=10.0, mixup=0.2, cutmix=0.5, noise=0.02),
    "schedule": Schedule(decay="plateau", factor=0.5, patience=1),
    "regularization": Regularization(l1=1e-4, weight_noise=0.05),
}


@pytest.mark.parametrize(
    ("optimizer", "methods"),
    [
        (AdamW(weight_decay=0.1), {}),
        (Sgd(momentum=0.9, nesterov=True), {}),
        (RmsProp(momentum=0.5, nesterov=True), METHODS),
        pytest.param(AdaGrad(), METHODS, marks=pytest.mark.slow),
        pytest.param(Adam(weight_decay=0.01), METHODS, marks=pytest.mark.slow),
    ],
)
def test_a_run_interrupted_at_any_step_ends_with_the_same_weights_bit_for_bit(
    optimizer: Optimizer, methods: dict[str, Any], tmp_path: Path
) -> None:
    items = digit_images(170)
    chosen = Chosen(epochs=8, batch_size=8, learning_rate=0.02)  # 8 steps an epoch
    recipe = {
        "optimizer": optimizer,
        "checkpoint_seconds": 0.0,
        "transfer": Transfer(freeze="stage0", unfreeze_epoch=2, layer_decay=0.8),
        "augmentation": Augmentation(rotation=10.0, translation=0.1, colour=0.1),
        "stopping": Stopping(metric="accuracy", patience=4, min_delta=0.05),
        "gradient_accumulation": 2,
        "evaluations_per_epoch": 2,
        **methods,
    }
    undisturbed = convolutions()
    expected = fit(undisturbed, items, tmp_path / "whole", chosen=chosen, **recipe)

    # Some of them in the middle of an evaluation; all but the first begin with other weights than the run did.
    for seed, question in enumerate((2, 7, 11, 13, 16)):
        with pytest.raises(Cancelled):
            fit(convolutions(seed=seed), items, tmp_path / "parts", Recorder(question), chosen=chosen, **recipe)
    network = convolutions(seed=9)
    found = fit(network, items, tmp_path / "parts", chosen=chosen, **recipe)

    assert differing(weights(undisturbed), weights(network)) == set()
    assert found == expected
    if not methods:
        assert 2 * 8 < found.steps < found.planned, "the run is to stop early, and after the unfreezing"
        assert found.best_step < found.steps


def test_a_checkpoint_from_before_the_interruption_gives_the_same_weights(tmp_path: Path) -> None:
    """Steps that were done after the last checkpoint are done again, as they were."""
    items = digit_images(170)
    chosen = Chosen(epochs=2, batch_size=8, learning_rate=0.01)
    undisturbed = convolutions()
    fit(undisturbed, items, tmp_path / "whole", chosen=chosen)

    with pytest.raises(Cancelled):
        fit(convolutions(), items, tmp_path / "parts", Recorder(14), chosen=chosen, checkpoint_seconds=0.0)
    newest = max((tmp_path / "parts").glob("step-*"))
    (newest / "weights.safetensors").write_bytes(b"torn")
    network, reporter = convolutions(seed=9), Recorder()
    fit(network, items, tmp_path / "parts", reporter, chosen=chosen)

    assert differing(weights(undisturbed), weights(network)) == set()
    assert f"{newest.name} cannot be used: weights.safetensors is damaged" in reporter.messages()
    assert f"going on from the checkpoint of step {int(newest.name[5:]) - 1}" in reporter.messages()


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    items, chosen = digit_vectors(), Chosen(epochs=2, batch_size=16, learning_rate=0.01)
    first, second, reporter = mlp(), mlp(seed=9), Recorder()
    expected = fit(first, items, tmp_path, chosen=chosen)
    assert fit(second, items, tmp_path, reporter, chosen=chosen) == expected
    assert differing(weights(first), weights(second)) == set()
    assert reporter.reports == []


def test_another_seed_gives_another_network(tmp_path: Path) -> None:
    items, chosen = digit_vectors(), Chosen(epochs=1, batch_size=16, learning_rate=0.01)
    one, other, again = mlp(), mlp(), mlp()
    fit(one, items, tmp_path / "1", chosen=chosen, seed=1)
    fit(other, items, tmp_path / "2", chosen=chosen, seed=2)
    fit(again, items, tmp_path / "3", chosen=chosen, seed=1)
    assert differing(weights(one), weights(other))
    assert not differing(weights(one), weights(again))


def test_it_learns(tmp_path: Path) -> None:
    reporter = Recorder()
    result = fit(
        mlp(), digit_vectors(1_200), tmp_path, reporter, chosen=Chosen(epochs=8, batch_size=32, learning_rate=5e-3)
    )
    assert result.best_metrics["accuracy"] >= 0.9
    assert result.evaluations[0]["train_loss"] > 2 * result.evaluations[-1]["train_loss"]
    last = reporter.reports[-1]
    assert last["step"] == last["total_steps"] == result.planned == 8 * steps_in_epoch(1_150, 32)
    assert last["eta_seconds"] == 0.0
    assert last["validation_accuracy"] == result.evaluations[-1]["validation_accuracy"]
    assert all(report["samples_per_second"] > 0 for report in reporter.reports)  # type: ignore[operator]
    assert sum("validation_loss" in report for report in reporter.reports) == 8


def test_frozen_blocks_do_not_change_in_a_single_bit(tmp_path: Path) -> None:
    network = convolutions()
    before = weights(network)
    chosen = Chosen(epochs=1, batch_size=8, learning_rate=0.1)
    fit(
        network,
        digit_images(),
        tmp_path,
        chosen=chosen,
        transfer=Transfer(freeze="stage0"),
        optimizer=AdamW(weight_decay=0.5),
    )
    changed = differing(before, weights(network))
    assert not any("stages.0" in name for name in changed)
    assert {"trunk.stages.1.0.weight", "trunk.stages.1.1.running_mean", "head.weight"} <= changed


def test_released_blocks_learn_from_their_epoch_on(tmp_path: Path) -> None:
    chosen = Chosen(epochs=2, batch_size=8, learning_rate=0.1)
    changed: dict[int, set[str]] = {}
    for epoch in (1, 2):
        network = convolutions()
        before = weights(network)
        transfer = Transfer(freeze="all", unfreeze_epoch=epoch)
        fit(
            network,
            digit_images(),
            tmp_path / str(epoch),
            chosen=chosen,
            transfer=transfer,
            stopping=Stopping(metric="loss", patience=9),
        )
        changed[epoch] = differing(before, weights(network))
    assert changed[2] == {"head.weight", "head.bias"}
    assert "trunk.stages.0.1.running_mean" in changed[1]


def test_an_unknown_block_is_an_error_that_lists_the_blocks(tmp_path: Path) -> None:
    chosen = Chosen(epochs=1, batch_size=8, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"no block 'stage7'.*stage0, stage1"):
        fit(convolutions(), digit_images(), tmp_path, chosen=chosen, transfer=Transfer(freeze="stage7"))


def test_accumulating_gradients_equals_a_large_batch(tmp_path: Path) -> None:
    items = digit_vectors(250)
    objective = CrossEntropy(10, class_weights=torch.arange(1.0, 11.0))
    found = {}
    for size, accumulation in ((16, 1), (4, 4), (4, 1)):
        network = mlp()
        chosen = Chosen(epochs=2, batch_size=size, learning_rate=0.05)
        fit(
            network,
            items,
            tmp_path / f"{size}-{accumulation}",
            chosen=chosen,
            objective=objective,
            optimizer=Sgd(),
            gradient_accumulation=accumulation,
        )
        found[size, accumulation] = network.head.weight.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(found[4, 4], found[16, 1], rtol=0.0, atol=1e-5)
    assert (found[4, 1] - found[16, 1]).abs().max() > 1e-2


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    items, reporter = digit_vectors(100), Recorder()
    network = mlp()
    before = weights(network)
    chosen = Chosen(epochs=1, batch_size=50, learning_rate=1.0)  # one step
    fit(
        network,
        items,
        tmp_path,
        reporter,
        chosen=chosen,
        optimizer=Sgd(momentum=0.0),
        schedule=CONSTANT,
        gradient_clip=0.01,
    )
    squares = sum(float((tensor - before[name]).double().square().sum()) for name, tensor in weights(network).items())
    assert squares**0.5 == pytest.approx(0.01, rel=1e-3)
    assert reporter.reports[-1]["gradient_norm"] > 0.1  # type: ignore[operator]  # as it was before


def test_early_stopping_stops_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    digits = digit_vectors(200)
    random = np.random.default_rng(0).integers(0, 10, 200)
    items = Items(random, None, digits.rows, digits.collate)  # nothing to learn: validation can only get worse
    network = mlp()
    chosen = Chosen(epochs=40, batch_size=16, learning_rate=0.01)
    result = fit(
        network, items, tmp_path, chosen=chosen, schedule=CONSTANT, stopping=Stopping(metric="loss", patience=3)
    )
    epoch_steps = steps_in_epoch(150, 16)
    losses = [evaluation["validation_loss"] for evaluation in result.evaluations]
    best = int(np.argmin(losses))
    assert result.steps == result.best_step + 3 * epoch_steps < result.planned
    assert len(losses) == best + 4
    assert result.best_step == (best + 1) * epoch_steps
    held_out = items.select(np.arange(150, 200))
    assert evaluate(network, held_out, CrossEntropy(10), 32, lambda: None).loss == pytest.approx(losses[best], rel=1e-6)


def test_without_early_stopping_the_lowest_validation_loss_is_kept(tmp_path: Path) -> None:
    digits = digit_vectors(200)
    items = Items(np.random.default_rng(0).integers(0, 10, 200), None, digits.rows, digits.collate)
    result = fit(mlp(), items, tmp_path, chosen=Chosen(epochs=8, batch_size=16, learning_rate=0.01), schedule=CONSTANT)
    losses = [evaluation["validation_loss"] for evaluation in result.evaluations]
    assert result.steps == result.planned
    assert result.best_metrics["loss"] == min(losses) < losses[-1]


def test_patience_counts_evaluations_that_do_not_improve_by_min_delta() -> None:
    progress = Progress(run="run")
    stopping = Stopping(metric="accuracy", patience=2, min_delta=0.1)
    verdicts = []
    for step, accuracy in enumerate([0.5, 0.55, 0.61, 0.65, 0.7], start=1):
        progress.step = step
        verdicts.append(
            (trainer.judge(progress, {"loss": 1.0, "accuracy": accuracy}, stopping, CrossEntropy(2)), progress.stopped)
        )
    # 0.55 and 0.65 are better than what was before, but not by 0.1; 0.61 is, and starts the count again.
    assert verdicts == [(True, False), (True, False), (True, False), (True, False), (True, True)]
    assert (progress.best_step, progress.best) == (5, 0.7)


def test_of_equal_evaluations_the_first_is_the_best() -> None:
    progress = Progress(run="run", step=1)
    assert trainer.judge(progress, {"loss": 0.5}, None, CrossEntropy(2))
    progress.step = 2
    assert not trainer.judge(progress, {"loss": 0.5}, None, CrossEntropy(2))
    assert progress.best_step == 1


@pytest.mark.parametrize("question", [1, 2, 6])
def test_cancelling_stops_before_the_next_step(question: int, tmp_path: Path) -> None:
    chosen = Chosen(epochs=5, batch_size=16, learning_rate=0.01)
    reporter = Recorder(cancel_at=question)
    with pytest.raises(Cancelled):
        fit(mlp(), digit_vectors(), tmp_path, reporter, chosen=chosen, checkpoint_seconds=0.0)
    assert [step for step, _ in reporter.checkpoints] == list(range(1, question))


@pytest.mark.parametrize(("steps", "evaluations", "expected"), [(10, 1, {10}), (10, 3, {4, 7, 10}), (2, 5, {1, 2})])
def test_evaluations_are_spread_over_the_epoch(steps: int, evaluations: int, expected: set[int]) -> None:
    assert trainer.evaluation_positions(steps, evaluations) == expected


def test_a_diverging_run_fails_in_words(tmp_path: Path) -> None:
    chosen = Chosen(epochs=3, batch_size=16, learning_rate=1e30)
    with pytest.raises(
        JobFailed, match=r"loss became (nan|inf) by step \d+: training diverged. Lower the learning rate"
    ):
        fit(mlp(), digit_vectors(), tmp_path, chosen=chosen, optimizer=Sgd(), gradient_clip=None)


def test_mixed_precision_trains_and_leaves_a_float32_network(tmp_path: Path) -> None:
    items, chosen = digit_vectors(), Chosen(epochs=3, batch_size=16, learning_rate=0.01)
    mixed, full = mlp(), mlp()
    result = fit(mixed, items, tmp_path / "mixed", chosen=chosen, precision="bfloat16")
    fit(full, items, tmp_path / "full", chosen=chosen)
    assert result.best_metrics["accuracy"] > 0.6
    assert differing(weights(mixed), weights(full))
    fresh = mlp(seed=9)
    fresh.load_state_dict(mixed.state_dict())
    fresh.eval()
    vectors = torch.from_numpy(items.batch(np.arange(8))["vector"])
    assert torch.equal(mixed(vectors)["logits"], fresh(vectors)["logits"])


def text_items() -> Items:
    """57 texts of 1 to 29 random tokens, of two classes."""
    random = np.random.default_rng(0)
    rows = [random.integers(1, 100, length) for length in random.integers(1, 30, 57)]

    def collate(chosen: np.ndarray) -> dict[str, np.ndarray]:
        longest = max(len(rows[row]) for row in chosen)
        ids = np.zeros((len(chosen), longest), np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(chosen):
            ids[i, : len(rows[row])], mask[i, : len(rows[row])] = rows[row], 1
        return {"input_ids": ids, "attention_mask": mask}

    return Items(random.integers(0, 2, 57), np.array([len(row) for row in rows]), np.arange(57), collate)


def test_words_are_dropped_in_training_and_not_in_evaluation(tmp_path: Path) -> None:
    items, network = text_items(), text_network()
    shares: dict[bool, list[float]] = {True: [], False: []}

    def watch(_: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        ids, mask = inputs
        shares[network.training].append(float(mask.sum() / (ids != 0).sum()))

    network.trunk.register_forward_pre_hook(watch)
    fit(
        network,
        items,
        tmp_path,
        chosen=Chosen(epochs=4, batch_size=10, learning_rate=1e-3),
        held_out=17,
        augmentation=Augmentation(word_dropout=0.4),
    )
    assert np.mean(shares[True]) == pytest.approx(0.6 + 0.4 / 15, abs=0.07)
    assert set(shares[False]) == {1.0}


def test_texts_are_evaluated_in_the_order_of_the_items() -> None:
    items, network, objective = text_items(), text_network(), CrossEntropy(2)
    batched = evaluate(network, items, objective, 8, lambda: None)
    single = [evaluate(network, items.select(np.array([i])), objective, 1, lambda: None) for i in range(57)]
    np.testing.assert_allclose(
        batched.kept["logits"], np.concatenate([one.kept["logits"] for one in single]), atol=1e-6
    )
    assert batched.loss == pytest.approx(np.mean([one.loss for one in single]), rel=1e-5)


def test_blocks_are_released_one_an_epoch_from_the_head(tmp_path: Path) -> None:
    found = fit(
        mlp(hidden=(16, 16, 16)),
        digit_vectors(150),
        tmp_path,
        chosen=Chosen(epochs=5, batch_size=100, learning_rate=1e-3),
        transfer=Transfer(freeze="hidden.1", unfreeze_epoch=2, gradual=True),
    )
    learning = [list(point.norms) for point in found.gradient_norms]
    assert learning == [
        ["hidden.2", "head"],
        ["hidden.2", "head"],
        ["hidden.1", "hidden.2", "head"],
        ["hidden.0", "hidden.1", "hidden.2", "head"],
        ["hidden.0", "hidden.1", "hidden.2", "head"],
    ]


@pytest.mark.slow
def test_two_processes_train_the_network_that_one_does(tmp_path: Path) -> None:
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module"]
    subprocess.run(
        [sys.executable, "-m", *launch, "tests.finetune.one_of_several", str(tmp_path / "two")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    first, second = (load_file(tmp_path / "two" / f"{process}-of-2.safetensors") for process in (0, 1))
    one = weights(train(tmp_path / "one"))
    assert not differing(first, second)
    for name in one:
        torch.testing.assert_close(first[name], one[name], rtol=0.0, atol=1e-5)
    assert (one["trunk.layers.0.weight"] - mlp().state_dict()["trunk.layers.0.weight"]).abs().max() > 1e-2


def test_gradient_norms_are_recorded_for_each_block_that_learns(tmp_path: Path) -> None:
    items = digit_vectors(200)
    found = fit(
        mlp(),
        items,
        tmp_path,
        chosen=Chosen(epochs=2, batch_size=50, learning_rate=0.0),
        gradient_clip=None,
        transfer=Transfer(freeze="hidden.0", unfreeze_epoch=1),
    )
    assert [point.step for point in found.gradient_norms] == [1, 2, 3, 4, 5, 6]
    assert [list(point.norms) for point in found.gradient_norms] == [
        *([["hidden.1", "head"]] * 3),
        *([["hidden.0", "hidden.1", "head"]] * 3),
    ]
    network = mlp()
    order = training_order(150, 50, 0, 1, None)
    batch = torch.from_numpy(items.batch(order[2])["vector"])
    targets = torch.from_numpy(items.targets[order[2]])
    torch.nn.functional.cross_entropy(network(batch)["logits"], targets).backward()
    for name, block in [*network.blocks(), ("head", network.head)]:
        assert block is not None
        squares = sum(float(p.grad.square().sum()) for p in block.parameters() if p.grad is not None)
        assert found.gradient_norms[5].norms[name] == pytest.approx(squares**0.5, rel=1e-4)


def test_gradients_vanish_through_sigmoids_and_not_through_relus(tmp_path: Path) -> None:
    def ratio(activation: str) -> float:
        torch.manual_seed(0)
        hyperparameters = {"features": 64, "hidden": [16] * 8, "activation": activation}
        network = registry.build(
            ModelSpec(architecture="mlp", hyperparameters=hyperparameters, task=Classification(10))
        )
        chosen = Chosen(epochs=1, batch_size=50, learning_rate=1e-3)
        found = fit(network, digit_vectors(150), tmp_path / activation, chosen=chosen).gradient_norms[0].norms
        return found["hidden.0"] / found["hidden.7"]

    assert ratio("sigmoid") < 1e-3
    assert ratio("relu") > 0.05
