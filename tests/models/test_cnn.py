"""Convolutional networks: as many parameters as their papers' authors published, and able to learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from models import registry
from models.catalog import ARCHITECTURES
from models.cnn.convolution import Separable
from models.network import Network
from models.spec import Classification, ModelSpec
from tests.models.narrow import SMALL


def network(name: str, classes: int = 10, **hyperparameters: Any) -> Network:
    return registry.build(ModelSpec(architecture=name, hyperparameters=hyperparameters, task=Classification(classes)))


def test_every_convolutional_network_is_under_test() -> None:
    assert {name for name, card in ARCHITECTURES.items() if card.builder.startswith("models.cnn.")} == SMALL.keys()


@pytest.mark.parametrize(
    ("name", "hyperparameters", "parameters"),
    [
        # 61,706 for images of one channel.
        ("lenet5", {"image_size": 32}, 62_006 - 850 + 85 * 1000),
        ("alexnet", {}, 62_378_344),
        ("vgg", {"depth": 11, "norm": False}, 132_863_336),
        ("vgg", {"depth": 13, "norm": False}, 133_047_848),
        ("vgg", {"depth": 16, "norm": False}, 138_357_544),
        ("vgg", {"depth": 19, "norm": False}, 143_667_240),
        # Others keep the 4,224 biases that batch norm takes away again.
        ("vgg", {"depth": 16}, 138_365_992 - 4_224),
        ("resnet", {"depth": 18}, 11_689_512),
        ("resnet", {"depth": 34}, 21_797_672),
        ("resnet", {"depth": 50}, 25_557_032),
        # 23,834,568 with 5 × 5 kernels in the first three modules, which the paper factorizes.
        ("inception_v3", {}, 23_834_568 - 3 * 48 * 64 * (25 - 9)),
        ("inception_resnet", {}, 55_843_464),
        ("xception", {}, 22_855_952),
        ("mobilenet", {}, 4_231_976),
    ],
)
def test_there_are_as_many_parameters_as_published(name: str, hyperparameters: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        found = network(name, classes=1000, **{"image_size": 224, **hyperparameters})
    assert sum(p.numel() for p in found.parameters()) == parameters


def test_googlenet_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        google = network("googlenet", classes=1000, image_size=224)
    # 6,998,552 with a bias for each channel, where a batch norm has a scale and a shift.
    norms = sum(m.num_features for m in google.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert sum(p.numel() for p in google.parameters()) - norms == 6_998_552


@pytest.mark.parametrize("name", SMALL)
def test_blocks_hold_every_parameter_once_from_the_input_to_the_head(name: str) -> None:
    found = network(name, **SMALL[name])
    inside = [id(p) for _, block in found.blocks() for p in block.parameters()]
    assert sorted(inside) == sorted(id(p) for p in found.trunk.parameters())
    names = [block for block, _ in found.blocks()]
    assert len(set(names)) == len(names) >= 4


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [32, 96, 224])
def test_images_of_any_size_are_read(name: str, size: int) -> None:
    found = network(name, **{**SMALL[name], "image_size": size}).eval()
    with torch.no_grad():
        answer = found(torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8))
    assert answer["logits"].shape == (2, 10)
    assert answer["embedding"].shape == (2, found.width)
    assert torch.isfinite(answer["logits"]).all()


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_of_digits_is_learned(name: str) -> None:
    torch.manual_seed(0)
    found = network(name, **SMALL[name])
    size = SMALL[name].get("image_size", 32)
    data = load_digits()
    small = np.repeat(data.images[:32, :, :, None], 3, axis=3) * 15.9
    pixels = torch.nn.functional.interpolate(torch.from_numpy(small).float().permute(0, 3, 1, 2), size)
    pixels, targets = pixels.permute(0, 2, 3, 1).to(torch.uint8), torch.from_numpy(data.target[:32])
    optimizer = torch.optim.AdamW(found.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(found(pixels)["logits"], targets).backward()
        optimizer.step()
    right = (found(pixels)["logits"].argmax(1) == targets).float().mean()
    assert right >= 0.9


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_pooling_takes_the_mean_or_the_largest_of_each_square(pooling: str) -> None:
    lenet = network("lenet5", image_size=32, pooling=pooling).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    lenet.get_submodule("trunk.pool").register_forward_hook(lambda _, given, found: seen.append((given[0], found)))
    lenet(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8))
    assert len(seen) == 2
    for given, found in seen:
        squares = given.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        torch.testing.assert_close(found, squares.mean(-1) if pooling == "average" else squares.amax(-1))


def test_a_plain_network_differs_from_a_residual_one_by_its_skips_only() -> None:
    torch.manual_seed(0)
    residual = network("resnet", **SMALL["resnet"]).eval()
    plain = network("resnet", skips=False, **SMALL["resnet"]).eval()
    plain.load_state_dict({k: v for k, v in residual.state_dict().items() if ".skip." not in k})
    x = torch.rand(1, residual.trunk.stem.conv.out_channels, 8, 8)
    skipping, straight = residual.blocks()[1][1], plain.blocks()[1][1]
    with torch.no_grad():
        torch.testing.assert_close(skipping(x), torch.relu(straight.layers(x) + x))
        torch.testing.assert_close(straight(x), torch.relu(straight.layers(x)))


def test_a_separable_convolution_is_two_convolutions_and_cheaper_by_the_formula() -> None:
    layer = Separable(6, 10)
    depthwise, pointwise = layer.depthwise.weight, layer.pointwise.weight
    full = pointwise[:, :, 0, 0][:, :, None, None] * depthwise[:, 0][None]
    x = torch.randn(1, 6, 9, 9)
    torch.testing.assert_close(
        layer.pointwise(layer.depthwise(x)), torch.nn.functional.conv2d(x, full, padding=1), rtol=1e-4, atol=1e-5
    )
    assert (depthwise.numel() + pointwise.numel()) / full.numel() == pytest.approx(1 / 10 + 1 / 9)
