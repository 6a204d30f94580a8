"""Networks: shapes, blocks, saving, and the errors of what cannot be built."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from models import registry
from models.catalog import ARCHITECTURES
from models.mlp import Perceptron
from models.network import Network
from models.spec import Classification, Embedding, ModelSpec

MLP = ModelSpec(
    architecture="mlp", hyperparameters={"features": 4, "hidden": [8, 6], "dropout": 0.5}, task=Classification(3)
)
LITE = ModelSpec(architecture="efficientnet_lite0", hyperparameters={"image_size": 32}, task=Classification(5))


def inputs_of(network: Network, batch: int) -> torch.Tensor:
    if network.input_names == ("vector",):
        return torch.randn(batch, 4)
    return torch.randint(0, 256, (batch, 32, 32, 3), dtype=torch.uint8)


@pytest.mark.parametrize("spec", [MLP, LITE], ids=lambda spec: str(spec.architecture))
@pytest.mark.parametrize("batch", [1, 5])
def test_outputs_have_the_shapes_that_the_manifest_promises(spec: ModelSpec, batch: int) -> None:
    network = registry.build(spec).eval()
    found = network(inputs_of(network, batch))
    assert isinstance(spec.task, Classification)
    assert found["logits"].shape == (batch, spec.task.classes)
    assert found["embedding"].shape == (batch, network.width)
    assert found["logits"].dtype == torch.float32


@pytest.mark.parametrize("spec", [MLP, LITE], ids=lambda spec: str(spec.architecture))
def test_every_trunk_parameter_is_in_exactly_one_block(spec: ModelSpec) -> None:
    network = registry.build(spec)
    in_blocks = [id(p) for _, block in network.blocks() for p in block.parameters()]
    assert sorted(in_blocks) == sorted(id(p) for p in network.trunk.parameters())
    names = [name for name, _ in network.blocks()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("spec", [MLP, LITE], ids=lambda spec: str(spec.architecture))
def test_a_saved_network_comes_back_bit_for_bit(spec: ModelSpec, tmp_path: Path) -> None:
    network = registry.build(spec).eval()
    registry.save(network, tmp_path)
    again = registry.restore(tmp_path).eval()
    assert again.spec == spec
    batch = inputs_of(network, 3)
    torch.testing.assert_close(again(batch)["logits"], network(batch)["logits"], rtol=0, atol=0)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    registry.save(registry.build(MLP), tmp_path)
    wider = msgspec.structs.replace(MLP, hyperparameters={"features": 4, "hidden": [9, 6]})
    (tmp_path / registry.SPEC).write_bytes(msgspec.json.encode(wider))
    with pytest.raises(ValueError, match="does not fit"):
        registry.restore(tmp_path)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    registry.save(registry.build(MLP), tmp_path)
    file = tmp_path / registry.WEIGHTS
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        registry.restore(tmp_path)


def test_an_embedding_has_no_logits() -> None:
    network = registry.build(msgspec.structs.replace(MLP, task=Embedding())).eval()
    assert network(torch.randn(2, 4)).keys() == {"embedding"}


def test_the_perceptron_computes_what_the_formula_says() -> None:
    network = registry.build(MLP).eval()
    trunk = network.trunk
    assert isinstance(trunk, Perceptron)
    data = torch.randn(50, 4) * 7 + 3
    trunk.standardize.fit(data)
    x = (data.numpy() - data.numpy().mean(0)) / data.numpy().std(0)
    for layer in trunk.layers:
        weight, bias = (p.detach().numpy() for p in layer.parameters())
        x = np.maximum(x @ weight.T + bias, 0)
    assert network.head is not None
    logits = x @ network.head.weight.detach().numpy().T + network.head.bias.detach().numpy()
    np.testing.assert_allclose(network(data)["logits"].detach().numpy(), logits, atol=1e-5)


def test_a_constant_feature_does_not_divide_by_zero() -> None:
    network = registry.build(MLP).eval()
    assert isinstance(network.trunk, Perceptron)
    network.trunk.standardize.fit(torch.ones(10, 4))
    assert torch.isfinite(network(torch.ones(2, 4))["logits"]).all()


def test_stochastic_depth_keeps_the_expectation() -> None:
    spec = msgspec.structs.replace(LITE, hyperparameters={"image_size": 32, "drop_connect": 0.5})
    network = registry.build(spec)
    from models.backbones.efficientnet_lite import InvertedResidual

    torch.manual_seed(0)
    block = next(m for m in network.modules() if isinstance(m, InvertedResidual) and m.skip and m.drop > 0.3)
    x = torch.randn(1, block.project.conv.out_channels, 2, 2).repeat(1000, 1, 1, 1)
    block.eval()
    full = (block(x) - x)[0]
    block.training = True  # the batch norms inside stay in evaluation, so that every item is treated alike
    answers = block(x) - x
    dropped = (answers == 0).all(dim=(1, 2, 3))
    torch.testing.assert_close(answers[~dropped], (full / (1 - block.drop)).expand_as(answers[~dropped]))
    assert abs(dropped.float().mean() - block.drop) < 0.05


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ModelSpec(architecture="perceptron"), "known: .*mlp"),
        (ModelSpec(architecture="mlp", hyperparameters={"hiden": [3]}), "hiden"),
        (ModelSpec(architecture="mlp", task=Classification(2)), "features"),
        (ModelSpec(architecture="mlp", hyperparameters={"features": 4}), "task is open"),
        (ModelSpec(architecture="text_encoder", task=Classification(2)), "weights"),
    ],
)
def test_what_cannot_be_built_says_why(spec: ModelSpec, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        registry.build(spec)


def test_every_card_names_a_builder_that_is_there() -> None:
    import importlib

    for card in ARCHITECTURES.values():
        module, _, function = card.builder.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
