"""Generative adversarial networks: what is made, who has gradients, and what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from export.onnx import export_onnx
from export.parity import check
from models import registry
from models.gan import Gan
from models.image_space import COMPONENTS, ImageSpace
from models.spec import Classification, Generation, ModelSpec
from tests.finetune.small import differing, weights

BOTH = pytest.mark.parametrize("layers", ["convolutional", "dense"])


def gan(**hyperparameters: Any) -> Gan:
    torch.manual_seed(0)
    given = {"image_size": 16, "width": 4, "latent": 5, **hyperparameters}
    network = registry.build(ModelSpec(architecture="gan", hyperparameters=given, task=Generation()))
    assert isinstance(network, Gan)
    return network


def pixels(items: int, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (items, size, size, 3), dtype=torch.uint8)


@BOTH
@pytest.mark.parametrize("size", [16, 19, 28, 50, 64])
def test_images_of_any_size_are_made_and_told(layers: str, size: int) -> None:
    network = gan(layers=layers, image_size=size)
    found = network.eval().compare(pixels(3, size), torch.Generator().manual_seed(0))
    assert found["image"].shape == (3, size, size, 3)
    assert found["image"].dtype == torch.uint8
    assert found["real"].shape == found["generated"].shape == (3,)


@BOTH
def test_every_parameter_is_in_exactly_one_block(layers: str) -> None:
    network = gan(layers=layers)
    in_blocks = [id(p) for _, block in network.blocks() for p in block.parameters()]
    assert sorted(in_blocks) == sorted(id(p) for p in network.parameters())
    names = [name.partition(".")[0] for name, _ in network.blocks()]
    assert names == sorted(names, reverse=True), "the generator's first"


@BOTH
@pytest.mark.parametrize("learns", ["discriminator", "generator"])
def test_only_one_half_has_gradients_and_moves_its_statistics(layers: str, learns: Any) -> None:
    network = gan(layers=layers).train()
    before = weights(network)
    answers = network(pixels(8), learns)
    sum(answer.sum() for answer in answers.values()).backward()  # type: ignore[union-attr]
    assert all((p.grad is not None) == name.startswith(learns) for name, p in network.named_parameters())
    moved = differing(before, weights(network))
    assert all(name.startswith(learns) for name in moved)
    assert bool(moved) == (layers == "convolutional"), "running statistics of batch norms"


def test_a_generator_step_has_the_gradient_of_the_whole_chain() -> None:
    """The discriminator is passed through, not around: the gradient is that of D(G(z)) with D's weights as they are."""
    network, real = gan(layers="dense").train(), pixels(8)
    torch.manual_seed(3)
    network(real, "generator")["fooled"].sum().backward()
    torch.manual_seed(3)
    latent = torch.randn(8, 5)
    first = next(network.generator.parameters())
    expected = torch.autograd.grad(network.discriminator(network.generator(latent)).sum(), first)[0]
    torch.testing.assert_close(first.grad, expected)


def test_weights_begin_as_in_the_paper() -> None:
    network = gan(width=64, image_size=32)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert float(module.weight.detach().mean()) == pytest.approx(1.0, abs=0.01)
    up = [type(module) for module in network.generator.modules() if not isinstance(module, nn.Sequential)]
    assert up[-2:] == [nn.ConvTranspose2d, nn.Tanh], "no batch norm at the image"
    down = [type(module) for module in network.discriminator.modules() if not isinstance(module, nn.Sequential)]
    assert down[:2] == [nn.Conv2d, nn.LeakyReLU], "nor here"


@pytest.mark.parametrize(
    ("layers", "size"),
    [
        ("convolutional", 20),
        ("dense", 16),
        *(pytest.param("convolutional", s, marks=pytest.mark.slow) for s in (33, 64)),
    ],
)
def test_the_exported_generator_makes_the_same_images_in_any_batch(layers: str, size: int, tmp_path: Path) -> None:
    network = gan(layers=layers, image_size=size, width=16)
    network.train()
    for _ in range(3):  # running statistics that are not those of the beginning
        network(pixels(8, size), "generator")
    graphs = export_onnx(network, tmp_path, {"pixels": pixels(4, size).numpy()})
    found = check(network, tmp_path, [{"pixels": pixels(6, size).numpy()}])
    assert found.batch_sizes == [1, 6, 9]
    (latent,), (image,) = graphs["model"].inputs, graphs["model"].outputs
    assert (latent.name, latent.dtype, latent.shape) == ("latent", "float32", ["batch", 5])
    assert (image.name, image.dtype, image.shape) == ("image", "uint8", ["batch", size, size, 3])

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    noise = np.random.default_rng(0).standard_normal((9, 5), dtype=np.float32)
    together = session.run(["image"], {"latent": noise})[0]
    alone = np.concatenate([session.run(["image"], {"latent": row[None]})[0] for row in noise])
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert together.std() > 0


def test_a_gan_does_nothing_else() -> None:
    with pytest.raises(ValueError, match="gan has no way to do the task classification"):
        registry.build(ModelSpec(architecture="gan", task=Classification(2)))


def test_the_space_of_images_has_the_principal_components() -> None:
    """Against an exact decomposition: the same variances, uncorrelated, and 1 in all where nothing is left out."""
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(6, 3 * 8 * 8, generator=random)
    strengths = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    images = (torch.randn(300, 6, generator=random) * strengths @ directions + 1.0).view(300, 3, 8, 8)
    space = ImageSpace(8)
    space.measure(images)
    features = space(images)
    assert features.shape == (300, COMPONENTS)
    covariance = torch.cov(features.T, correction=0)
    values = torch.linalg.svdvals(images.flatten(1) - images.flatten(1).mean(0)).square()
    torch.testing.assert_close(covariance.diag()[:6], (values / values.sum())[:6], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(covariance, torch.diag(covariance.diag()), rtol=0, atol=1e-4)
    assert float(covariance.trace()) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(features.mean(0), torch.zeros(COMPONENTS), rtol=0, atol=1e-4)


def test_images_of_independent_pixels_have_the_pixels_own_deviations() -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(400, 3, 8, 8, generator=random) * torch.linspace(0.1, 3.0, 192).view(3, 8, 8)
    space = ImageSpace(8)
    space.measure(images)
    features = space.independent_pixels(torch.randn(20_000, 192, generator=random))
    expected = space.components.T @ torch.diag(space.deviation.square()) @ space.components
    torch.testing.assert_close(torch.cov(features.T), expected, rtol=0.1, atol=2e-3)


def test_a_few_images_leave_the_rest_of_the_space_empty() -> None:
    space = ImageSpace(64)
    space.measure(torch.rand(3, 3, 64, 64))
    assert space(torch.rand(5, 3, 64, 64)).shape == (5, COMPONENTS)
    assert not space.components[:, 3:].any()
