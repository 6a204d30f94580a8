"""Autoencoders, by what they are known for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.datasets import load_digits

from models import registry
from models.autoencoders.autoencoder import Autoencoder
from models.autoencoders.vae import Vae
from models.network import Headed, Network
from models.spec import Classification, ModelSpec, Reconstruction
from tests.models.narrow import SMALL_CODES


def network(architecture: str, seed: int = 0, **hyperparameters: Any) -> Network:
    torch.manual_seed(seed)
    spec = ModelSpec(architecture=architecture, hyperparameters=hyperparameters, task=Reconstruction())
    return registry.build(spec)


def images(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


def measured(found: Network, raw: torch.Tensor) -> Network:
    found.measure(lambda: [raw], torch.zeros(len(raw)))
    return found.eval()


KINDS = [
    *SMALL_CODES,
    ("autoencoder", {"image_size": 16, "channels": [], "hidden": [20, 10], "activation": "sigmoid"}),
]


@pytest.mark.parametrize(("architecture", "hyperparameters"), KINDS)
def test_what_goes_in_comes_out_in_the_same_units(architecture: str, hyperparameters: dict[str, Any]) -> None:
    raw = torch.randn(6, 4) * 40 + 7 if "features" in hyperparameters else images(6, hyperparameters["image_size"])
    built = measured(network(architecture, **hyperparameters), raw)
    found = built(raw)
    assert found["reconstruction"].shape == raw.shape
    assert found["reconstruction"].dtype == raw.dtype
    assert found["error"].shape == (6,)
    assert found["error"].dtype == torch.float32
    assert found["embedding"].ndim == 2
    scale = raw.std(0, correction=0) if "features" in hyperparameters else torch.tensor(255.0)
    squares = ((found["reconstruction"].float() - raw.float()) / scale).square().flatten(1).mean(1)
    if "features" in hyperparameters:
        torch.testing.assert_close(found["error"], squares, rtol=1e-4, atol=1e-5)
    in_blocks = [id(p) for _, block in built.blocks() for p in block.parameters()]
    assert sorted(in_blocks) == sorted(id(p) for p in built.parameters())


@pytest.mark.parametrize("architecture", ["autoencoder", "vae"])
def test_a_network_that_knows_only_the_mean_image_answers_it(architecture: str) -> None:
    raw = images(50, 16)
    built = measured(network(architecture, image_size=16), raw)
    assert isinstance(built, Autoencoder | Vae)
    for parameter in built.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    found = built(raw)
    mean = raw.double().mean(0)
    assert (found["reconstruction"][0].double() - mean).abs().max() <= 0.501
    expected = (raw.double() - mean).square().flatten(1).mean(1) / 255**2
    torch.testing.assert_close(found["error"].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_linear_autoencoder_spans_the_subspace_of_the_first_principal_components() -> None:
    digits = torch.tensor(load_digits().data, dtype=torch.float32)
    digits = digits[:, digits.std(0) > 0.5]
    features, code = digits.shape[1], 5
    built = network("autoencoder", features=features, hidden=[], code=code)
    assert isinstance(built, Autoencoder)
    built.measure(lambda: [digits], torch.zeros(1))
    optimizer = torch.optim.LBFGS(built.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = built(digits)["error"].mean()
        loss.backward()
        return loss

    optimizer.step(step)
    x = ((digits - digits.mean(0)) / digits.std(0, correction=0)).double().numpy()
    _, singular, components = np.linalg.svd(x, full_matrices=False)
    best = (singular[code:] ** 2).sum() / x.size
    with torch.no_grad():
        error = float(built(digits)["error"].mean())
    assert error == pytest.approx(best, rel=0.01)
    assert error >= best * (1 - 1e-5), "no linear map does better"
    spanned = built.decoder.spread.weight.detach().double().numpy()  # type: ignore[union-attr]
    assert np.degrees(subspace_angles(spanned, components[:code].T)).max() < 3.0


def test_the_encoder_with_a_head_takes_the_codes_for_its_features() -> None:
    vectors = torch.randn(8, 5) * 3 + 1
    for architecture in ("autoencoder", "vae"):
        learned = measured(network(architecture, features=5, hidden=[7]), vectors)
        spec = ModelSpec(
            architecture=architecture, hyperparameters={"features": 5, "hidden": [7]}, task=Classification(3)
        )
        classifier = registry.build(spec)
        assert isinstance(classifier, Headed)
        encoder = {name: tensor for name, tensor in learned.state_dict().items() if name.startswith("trunk.")}
        assert {name for name in classifier.state_dict() if not name.startswith("head.")} == encoder.keys()
        classifier.load_state_dict(encoder, strict=False)
        torch.testing.assert_close(
            classifier.eval()(vectors)["embedding"], learned(vectors)["embedding"], rtol=0, atol=0
        )
        assert [name for name, _ in classifier.blocks()] == ["hidden0", "code"]


def test_a_saved_autoencoder_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for number, (architecture, hyperparameters) in enumerate(KINDS):
        raw = torch.randn(4, 4) if "features" in hyperparameters else images(4, hyperparameters["image_size"])
        built = measured(network(architecture, **hyperparameters), raw)
        folder = tmp_path / str(number)
        folder.mkdir()
        registry.save(built, folder)
        again = registry.restore(folder).eval()
        for name in built.output_names:
            torch.testing.assert_close(again(raw)[name], built(raw)[name], rtol=0, atol=0)


def test_what_is_drawn_has_the_deviation_that_the_encoder_says() -> None:
    vectors = torch.randn(2, 5).repeat_interleave(3000, dim=0)
    built = measured(network("vae", features=5, latent=3), vectors)
    assert isinstance(built, Vae)
    torch.nn.init.constant_(built.log_variance.bias, np.log(0.25))
    drawn: list[torch.Tensor] = []
    built.decoder.register_forward_pre_hook(lambda _, given: drawn.append(given[0]))
    built(vectors, noise=torch.randn_like)
    codes = drawn[0].view(2, 3000, 3)
    torch.testing.assert_close(codes.mean(1), built(vectors)["embedding"][::3000], rtol=0, atol=0.05)
    torch.testing.assert_close(codes.std(1), torch.full((2, 3), 0.5), rtol=0.06, atol=0)


def test_the_likelihoods_are_those_of_torch() -> None:
    pixels, vectors = images(4, 16), torch.randn(4, 5) * 2 + 1
    lit = measured(network("vae", image_size=16), pixels)
    found = lit(pixels)
    assert isinstance(lit, Vae)
    mean = (pixels / 255.0).mean(0).permute(2, 0, 1).clamp(0.01, 0.99)
    odds = lit.decoder(found["embedding"]) + torch.logit(mean)
    chances = torch.distributions.Bernoulli(logits=odds, validate_args=False)
    x = pixels.permute(0, 3, 1, 2) / 255.0
    torch.testing.assert_close(found["surprise"], -chances.log_prob(x).flatten(1).sum(1), rtol=1e-4, atol=1e-3)
    normal = measured(network("vae", features=5), vectors)
    assert isinstance(normal, Vae)
    with torch.no_grad():
        normal.likelihood.log_variance.fill_(np.log(0.3))  # type: ignore[union-attr, operator]
    found = normal(vectors)
    decoded = torch.distributions.Normal(normal.decoder(found["embedding"]), 0.3**0.5)
    x = (vectors - vectors.mean(0)) / vectors.std(0, correction=0)
    torch.testing.assert_close(found["surprise"], -decoded.log_prob(x).sum(1), rtol=1e-4, atol=1e-4)


def test_the_generator_makes_of_a_code_what_the_network_makes_of_it() -> None:
    for raw, hyperparameters in ((images(3, 16), {"image_size": 16}), (torch.randn(3, 5) * 9, {"features": 5})):
        built = measured(network("vae", **hyperparameters), raw)
        generator = built.graphs()["generator"]
        assert generator.inputs == ("latent",)
        found = built(raw)
        (name,) = generator.outputs
        assert name == ("image" if "image_size" in hyperparameters else "vector")
        torch.testing.assert_close(generator.module(found["embedding"])[name], found["reconstruction"])


@pytest.mark.parametrize(
    ("architecture", "hyperparameters", "words"),
    [
        ("autoencoder", {}, "what it reads is open"),
        ("vae", {"features": 4, "image_size": 16}, "give one"),
        ("autoencoder", {"features": 4, "channels": [8]}, "`channels` are of images"),
        ("vae", {"features": 4, "code": 3}, "code"),
    ],
)
def test_what_cannot_be_built_says_why(architecture: str, hyperparameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network(architecture, **hyperparameters)
