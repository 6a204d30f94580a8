"""Parameter groups, freezing and schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune import optim, trainer
from finetune.checkpoint import Progress
from finetune.recipe import AdaGrad, Adam, AdamW, Optimizer, RmsProp, Schedule, Sgd, Transfer
from models.network import Network
from tests.finetune.small import convolutions, differing, mlp, weights


def step_with_gradients(network: Network, optimizer: torch.optim.Optimizer, gradient: float) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize(
    "section",
    [
        *(AdamW(weight_decay=0.5), Sgd(weight_decay=0.5), Sgd(momentum=0.0, weight_decay=0.5)),
        *(Adam(weight_decay=0.5), AdaGrad(weight_decay=0.5), RmsProp(weight_decay=0.5)),
        RmsProp(momentum=0.5, nesterov=True, weight_decay=0.5),
    ],
)
def test_weight_decay_pulls_weights_and_leaves_biases_and_norms(section: Optimizer) -> None:
    network = convolutions()
    before = weights(network)
    optimizer = optim.build(network, section, Transfer())
    optim.set_learning_rate(optimizer, 0.1)
    step_with_gradients(network, optimizer, 0.0)
    changed = differing(before, weights(network))
    assert changed == {"trunk.stages.0.0.weight", "trunk.stages.1.0.weight", "head.weight"}
    after = weights(network)
    for name in changed:
        if isinstance(section, AdamW | Sgd):
            torch.testing.assert_close(after[name], before[name] * (1 - 0.1 * 0.5))
        else:  # divided by its own size: towards zero all the same
            assert ((before[name] - after[name]) * before[name] >= 0.0).all()


def test_a_frozen_parameter_does_not_decay() -> None:
    network = convolutions()
    before = weights(network)
    optimizer = optim.build(network, AdamW(weight_decay=0.5), Transfer())
    optim.set_learning_rate(optimizer, 0.1)
    optim.set_mode(network, optim.frozen_blocks(network, "all"))
    network(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))["logits"].sum().backward()
    optimizer.step()
    assert differing(before, weights(network)) == {"head.weight", "head.bias"}


def test_layer_decay_slows_each_block_by_its_distance_from_the_head() -> None:
    network = mlp(hidden=(16, 16, 16))
    before = weights(network)
    optimizer = optim.build(network, Sgd(momentum=0.0), Transfer(layer_decay=0.5))
    optim.set_learning_rate(optimizer, 0.1)
    step_with_gradients(network, optimizer, 1.0)
    moved = {name: float((before[name] - tensor).mean()) for name, tensor in weights(network).items()}
    assert moved["head.weight"] == pytest.approx(0.1, rel=1e-4)
    for layer, distance in ((2, 1), (1, 2), (0, 3)):
        assert moved[f"trunk.layers.{layer}.weight"] == pytest.approx(0.1 * 0.5**distance, rel=1e-3)
        assert moved[f"trunk.layers.{layer}.bias"] == pytest.approx(0.1 * 0.5**distance, rel=1e-3)


@pytest.mark.parametrize("kind", [AdamW, Adam])
def test_adam_takes_its_betas_and_epsilon_from_the_recipe(kind: type[AdamW | Adam]) -> None:
    """The first step of Adam is lr · g / (|g| + epsilon), the second follows from the betas by hand."""
    network = mlp()
    start = network.head.bias.detach().clone()  # type: ignore[union-attr]
    optimizer = optim.build(network, kind(weight_decay=0.0, beta1=0.5, beta2=0.25, epsilon=1.0), Transfer())
    optim.set_learning_rate(optimizer, 0.1)
    step_with_gradients(network, optimizer, 3.0)
    step_with_gradients(network, optimizer, 1.0)
    first = 3.0 / (3.0 + 1.0)
    mean = (0.5 * (0.5 * 3.0) + 0.5 * 1.0) / (1 - 0.5**2)
    square = (0.25 * (0.75 * 9.0) + 0.75 * 1.0) / (1 - 0.25**2)
    second = mean / (square**0.5 + 1.0)
    moved = start - network.head.bias.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1 * (first + second)))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.5, True)])
def test_momentum_is_its_formula(momentum: float, nesterov: bool) -> None:
    """v ← α v + g; θ ← θ - ε v, or with Nesterov's look ahead θ - ε (g + α v) (Sutskever et al. 2013)."""
    network = mlp()
    start = network.head.bias.detach().clone()  # type: ignore[union-attr]
    optimizer = optim.build(network, Sgd(momentum=momentum, nesterov=nesterov), Transfer())
    optim.set_learning_rate(optimizer, 0.1)
    moved = velocity = 0.0
    for gradient in (3.0, 1.0, -2.0):
        step_with_gradients(network, optimizer, gradient)
        velocity = momentum * velocity + gradient
        moved += 0.1 * (gradient + momentum * velocity if nesterov else velocity)
    found = start - network.head.bias.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(found, torch.full_like(found, moved))


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="nesterov is a kind of momentum"):
        Sgd(momentum=0.0, nesterov=True)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_rmsprop_is_its_formula(momentum: float, nesterov: bool) -> None:
    if nesterov and not momentum:
        with pytest.raises(ValueError, match="nesterov is a kind of momentum"):
            RmsProp(nesterov=True)
        return
    network = mlp()
    start = network.head.bias.detach().clone()  # type: ignore[union-attr]
    section = RmsProp(decay=0.75, momentum=momentum, nesterov=nesterov, epsilon=0.5)
    optimizer = optim.build(network, section, Transfer())
    optim.set_learning_rate(optimizer, 0.1)
    moved = square = velocity = 0.0
    for gradient in (3.0, 1.0, -2.0):
        step_with_gradients(network, optimizer, gradient)
        square = 0.75 * square + 0.25 * gradient**2
        update = gradient / (square**0.5 + 0.5)
        velocity = momentum * velocity + update
        moved += 0.1 * (update + momentum * velocity if nesterov else velocity)
    found = start - network.head.bias.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(found, torch.full_like(found, moved))


def test_rmsprop_without_nesterov_does_what_torchs_own_does() -> None:
    one, other = convolutions(), convolutions()
    ours = optim.build(one, RmsProp(decay=0.9, momentum=0.8), Transfer())
    optim.set_learning_rate(ours, 0.01)
    theirs = torch.optim.RMSprop(other.parameters(), lr=0.01, alpha=0.9, momentum=0.8, eps=1e-8)
    pixels = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8)
    for _ in range(5):
        for network, optimizer in ((one, ours), (other, theirs)):
            optimizer.zero_grad()
            network.eval()(pixels)["logits"].square().sum().backward()
            optimizer.step()
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=1e-4, atol=1e-6)


def test_adagrad_divides_by_the_root_of_all_squares_so_far() -> None:
    network = mlp()
    start = network.head.bias.detach().clone()  # type: ignore[union-attr]
    optimizer = optim.build(network, AdaGrad(epsilon=0.5), Transfer())
    optim.set_learning_rate(optimizer, 0.1)
    for gradient in (3.0, 4.0):
        step_with_gradients(network, optimizer, gradient)
    found = start - network.head.bias.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(found, torch.full_like(found, 0.1 * (3 / (3 + 0.5) + 4 / (5 + 0.5))))


def test_adams_weight_decay_is_part_of_the_gradient_and_adamws_is_not() -> None:
    def moved(section: Adam | AdamW) -> torch.Tensor:
        network = mlp()
        before = network.head.weight.detach().clone()  # type: ignore[union-attr]
        optimizer = optim.build(network, section, Transfer())
        optim.set_learning_rate(optimizer, 0.1)
        step_with_gradients(network, optimizer, 0.0)
        return before - network.head.weight.detach()  # type: ignore[union-attr]

    weight = mlp().head.weight.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(moved(Adam(weight_decay=0.5)), 0.1 * weight.sign(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved(AdamW(weight_decay=0.5)), 0.1 * 0.5 * weight)


def test_l1_makes_small_weights_zero_and_leaves_biases() -> None:
    network = convolutions()
    before = weights(network)
    optimizer = optim.build(network, Sgd(), Transfer())
    optim.set_learning_rate(optimizer, 0.1)
    for parameter in network.parameters():
        parameter.grad = None if parameter is network.trunk.stages[0][0].weight else torch.ones_like(parameter)
    optim.shrink(optimizer, 0.5)
    assert differing(before, weights(network)) == {"trunk.stages.1.0.weight", "head.weight"}
    old, new = before["head.weight"], weights(network)["head.weight"]
    torch.testing.assert_close(new, old.sign() * (old.abs() - 0.05).clamp(min=0))
    assert 0 < int((new == 0).sum()) < new.numel()


def test_noise_on_the_weights_is_gone_afterwards_bit_for_bit() -> None:
    network = convolutions()
    before = weights(network)
    with optim.noisy(network, 0.1):
        changed = differing(before, weights(network))
        noise = weights(network)["head.weight"] - before["head.weight"]
    assert changed == {"trunk.stages.0.0.weight", "trunk.stages.1.0.weight", "head.weight"}
    assert float(noise.std() / before["head.weight"].std()) == pytest.approx(0.1, rel=0.2)
    assert differing(before, weights(network)) == set()


def test_the_rate_falls_at_milestones_and_plateaus() -> None:
    steps = Schedule(warmup=0.0, decay="step", factor=0.5, milestones=(0.3, 0.6))
    rates = [optim.learning_rate(steps, 2.0, step, 10) for step in range(10)]
    assert rates == pytest.approx([2.0] * 3 + [1.0] * 3 + [0.5] * 4)
    plateau = Schedule(warmup=0.0, decay="plateau", factor=0.1, floor=0.05)
    assert [optim.learning_rate(plateau, 1.0, 5, 10, n) for n in (0, 1, 2)] == pytest.approx([1.0, 0.145, 0.0595])


def test_a_plateau_is_patience_evaluations_without_a_lower_loss() -> None:
    progress, schedule = Progress(run="run"), Schedule(decay="plateau", patience=2)
    found = []
    for loss in (1.0, 0.9, 0.95, 0.91, 0.92, 0.8, 0.8, 0.8, 0.8):
        trainer.watch_plateau(progress, loss, schedule)
        found.append(progress.plateaus)
    assert found == [0, 0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("section", [AdamW(), Adam(), Sgd(), AdaGrad(), RmsProp(momentum=0.5, nesterov=True)])
def test_state_comes_back_whole_in_the_layout_of_the_parameters(section: Optimizer) -> None:
    def prepared() -> tuple[Network, torch.optim.Optimizer]:
        network = convolutions().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = optim.build(network, section, Transfer())
        optim.set_learning_rate(optimizer, 0.1)
        return network, optimizer

    def step(network: Network, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(noise)
        optimizer.step()

    one, its = prepared()
    step(one, its, 1)
    saved = {name: tensor.contiguous() for name, tensor in optim.state_tensors(its).items()}  # as a file holds them
    other, new = prepared()
    other.load_state_dict(one.state_dict())
    optim.load_state_tensors(new, saved)
    step(one, its, 2)
    step(other, new, 2)
    assert not differing(weights(one), weights(other))


def test_blocks_freeze_from_the_input() -> None:
    network = mlp(hidden=(16, 16, 16))
    names = dict(network.blocks())
    assert optim.frozen_blocks(network, None) == []
    assert optim.frozen_blocks(network, "hidden.1") == [names["hidden.0"], names["hidden.1"]]
    assert optim.frozen_blocks(network, "all") == list(names.values())
    assert optim.frozen_blocks(network, None, 1) == [names["hidden.0"], names["hidden.1"]]
    assert optim.frozen_blocks(network, None, 0) == list(names.values())
    assert optim.frozen_blocks(network, None, 3) == []
    with pytest.raises(ValueError, match=r"train_last: 4 blocks, but there are 3, from the input hidden.0, hidden.1"):
        optim.frozen_blocks(network, None, 4)
    with pytest.raises(ValueError, match=r"no block 'layer1'; from the input they are hidden.0, hidden.1, hidden.2"):
        optim.frozen_blocks(network, "layer1")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": "all", "train_last": 1}, "give one of them"),
        ({"unfreeze_epoch": 1}, "nothing is frozen"),
        ({"freeze": "all", "gradual": True}, "give unfreeze_epoch"),
    ],
)
def test_a_transfer_that_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Transfer(**fields)


def test_batch_norms_of_frozen_blocks_stay_in_evaluation_mode() -> None:
    network = convolutions()
    optim.set_mode(network, optim.frozen_blocks(network, "stage0"))
    stages = dict(network.blocks())
    assert not any(module.training for module in stages["stage0"].modules())
    assert all(module.training for module in stages["stage1"].modules())
    assert [parameter.requires_grad for parameter in stages["stage0"].parameters()] == [False] * 4
    optim.set_mode(network, [])
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(warmup=0.2, decay="constant"), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Schedule(warmup=0.2, decay="linear"), [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (Schedule(warmup=0.0, decay="linear", floor=0.5), [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]),
        (
            Schedule(warmup=0.2, decay="cosine", floor=0.1),
            [0.5, 1.0, 1.0, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254],
        ),
        (Schedule(warmup=1.0), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
    ],
)
def test_schedules(schedule: Schedule, expected: list[float]) -> None:
    rates = [optim.learning_rate(schedule, 2.0, step, 10) for step in range(10)]
    assert rates == pytest.approx([2.0 * value for value in expected], abs=2e-6)
