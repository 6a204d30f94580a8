"""Hidden layers: each activation is its formula, and two ReLU units are enough for XOR."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from models import registry
from models.catalog import Activation
from models.hidden import Maxout, Prelu, Rbf, hidden_layer
from models.spec import Classification, ModelSpec

ACTIVATIONS = get_args(Activation)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("relu", lambda z: max(0.0, z)),
        ("leaky_relu", lambda z: z if z > 0 else 0.01 * z),
        ("gelu", lambda z: z * 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))),
        ("gelu_sigmoid", lambda z: z / (1.0 + math.exp(-1.702 * z))),
        ("sigmoid", lambda z: 1.0 / (1.0 + math.exp(-z))),
        ("tanh", math.tanh),
        ("softplus", lambda z: math.log(1.0 + math.exp(z))),
    ],
)
def test_an_activation_is_its_formula(activation: Activation, formula: object) -> None:
    layer = hidden_layer(3, 4, activation, 2, 0.1)
    assert callable(formula)
    x = torch.randn(5, 3)
    z = (x @ layer.weight.T + layer.bias).detach()
    expected = torch.tensor([[formula(float(value)) for value in row] for row in z])
    torch.testing.assert_close(layer(x), expected)


def test_prelu_learns_a_slope_for_each_unit() -> None:
    layer = Prelu(3, 2, 0.0)
    layer.slope.data = torch.tensor([0.5, -1.0])
    x = torch.randn(6, 3)
    z = x @ layer.weight.T
    torch.testing.assert_close(layer(x), z.clamp(min=0) + torch.tensor([0.5, -1.0]) * z.clamp(max=0))
    layer(x).sum().backward()
    torch.testing.assert_close(layer.slope.grad, z.clamp(max=0).sum(0))


def test_maxout_is_the_largest_of_its_pieces() -> None:
    layer = Maxout(3, 4, 5, 0.1)
    x = torch.randn(6, 3)
    weight, bias = layer.maps.weight.view(4, 5, 3), layer.maps.bias.view(4, 5)
    for unit in range(4):
        expected = torch.stack([x @ weight[unit, k] + bias[unit, k] for k in range(5)]).amax(0)
        torch.testing.assert_close(layer(x)[:, unit], expected)


def test_an_rbf_unit_answers_one_at_its_template_and_falls_with_the_distance() -> None:
    layer = Rbf(3, 4)
    x = torch.randn(6, 3)
    widths = layer.log_width.exp()
    expected = torch.exp(-(x[:, None] - layer.templates[None]).square().sum(2) / widths.square())
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(layer.templates.detach()).diagonal(), torch.ones(4))
    assert widths[0].item() == pytest.approx(math.sqrt(6.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation: Activation) -> None:
    torch.manual_seed(0)
    layer = hidden_layer(3, 2, activation, 3, 0.1).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given, *_: layer(given), (x, *layer.parameters()))


def test_weights_start_as_he_and_glorot_say() -> None:
    torch.manual_seed(0)
    relu, tanh = hidden_layer(400, 600, "relu", 2, 0.1), hidden_layer(400, 600, "tanh", 2, 0.0)
    assert float(relu.weight.detach().std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert float(tanh.weight.detach().std()) == pytest.approx(math.sqrt(2 / 1000), rel=0.02)
    assert (relu.bias == 0.1).all()
    assert not tanh.bias.any()


def test_two_relu_units_learn_xor() -> None:
    torch.manual_seed(3)  # with two units, about every third start finds the way
    network = registry.build(
        ModelSpec(architecture="mlp", hyperparameters={"features": 2, "hidden": [2]}, task=Classification(2))
    )
    x, y = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1, 1, 0])
    network.trunk.get_submodule("standardize").fit(x)  # type: ignore[operator]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x)["logits"], y)
        loss.backward()
        optimizer.step()
    assert network(x)["logits"].argmax(1).tolist() == y.tolist()
    assert float(loss.detach()) < 0.05


def test_hidden_units_are_kept_by_half_and_a_bias_starts_a_little_above_zero() -> None:
    """Every hidden layer's units, the last ones too, which the head reads."""
    torch.manual_seed(0)
    hyperparameters = {"features": 4, "hidden": [500, 500], "dropout": 0.5, "activation": "softplus"}
    network = registry.build(
        ModelSpec(architecture="mlp", hyperparameters=hyperparameters, task=Classification(2))
    ).train()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    outputs: list[torch.Tensor] = []
    for name in ("trunk.layers.0", "trunk.layers.1"):
        network.get_submodule(name).register_forward_hook(lambda _, __, found: outputs.append(found))
    for name in ("trunk.layers.1", "head"):
        network.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append((outputs[-1], given[0])))
    network(torch.randn(20, 4))
    assert len(seen) == 2
    for whole, dropped in seen:
        kept = dropped != 0
        assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.02)
        torch.testing.assert_close(dropped[kept], 2.0 * whole[kept])
    assert all((network.get_parameter(f"trunk.layers.{i}.bias") == 0.1).all() for i in (0, 1))


def test_noise_and_dropout_on_the_input_are_for_training_only() -> None:
    torch.manual_seed(0)
    network = registry.build(
        ModelSpec(
            architecture="mlp",
            hyperparameters={"features": 1000, "hidden": [8], "input_dropout": 0.2, "input_noise": 0.5},
            task=Classification(2),
        )
    )
    seen: list[torch.Tensor] = []
    network.trunk.get_submodule("layers.0").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.ones(50, 1000)
    network.eval()(x)
    network.train()(x)
    assert torch.equal(seen[0], x)
    kept = seen[1] != 0
    assert float(kept.float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float(seen[1][kept].mean()) == pytest.approx(1 / 0.8, abs=0.02)
    assert float(seen[1][kept].std()) == pytest.approx(0.5 / 0.8, abs=0.02)
