"""Parameter groups, freezing and schedules."""

from __future__ import annotations

import pytest
import torch

from finetune import optim
from finetune.recipe import AdamW, Schedule, Sgd, Transfer
from models.network import Network
from tests.finetune.small import convolutions, differing, mlp, weights


def step_with_gradients(network: Network, optimizer: torch.optim.Optimizer, gradient: float) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize("section", [AdamW(weight_decay=0.5), Sgd(weight_decay=0.5)])
def test_weight_decay_pulls_weights_and_leaves_biases_and_norms(section: AdamW | Sgd) -> None:
    network = convolutions()
    before = weights(network)
    optimizer = optim.build(network, section, Transfer())
    optim.set_learning_rate(optimizer, 0.1)
    step_with_gradients(network, optimizer, 0.0)
    changed = differing(before, weights(network))
    assert changed == {"trunk.stages.0.0.weight", "trunk.stages.1.0.weight", "head.weight"}
    after = weights(network)
    for name in changed:
        torch.testing.assert_close(after[name], before[name] * (1 - 0.1 * 0.5))


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


def test_adamw_takes_its_betas_and_epsilon_from_the_recipe() -> None:
    """The first step of Adam is lr · g / (|g| + epsilon), the second follows from the betas by hand."""
    network = mlp()
    start = network.head.bias.detach().clone()  # type: ignore[union-attr]
    optimizer = optim.build(network, AdamW(weight_decay=0.0, beta1=0.5, beta2=0.25, epsilon=1.0), Transfer())
    optim.set_learning_rate(optimizer, 0.1)
    step_with_gradients(network, optimizer, 3.0)
    step_with_gradients(network, optimizer, 1.0)
    first = 3.0 / (3.0 + 1.0)
    mean = (0.5 * (0.5 * 3.0) + 0.5 * 1.0) / (1 - 0.5**2)
    square = (0.25 * (0.75 * 9.0) + 0.75 * 1.0) / (1 - 0.25**2)
    second = mean / (square**0.5 + 1.0)
    moved = start - network.head.bias.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1 * (first + second)))


@pytest.mark.parametrize("section", [AdamW(), Sgd()])
def test_state_comes_back_whole_in_the_layout_of_the_parameters(section: AdamW | Sgd) -> None:
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
    with pytest.raises(ValueError, match=r"no block 'layer1'; from the input they are hidden.0, hidden.1, hidden.2"):
        optim.frozen_blocks(network, "layer1")


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
