"""What autoencoders learn by: the formulas, and what they do to a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from finetune import recipe
from finetune.automatic import Chosen
from finetune.evaluate import evaluate, report
from finetune.objectives.elbo import Elbo, divergence
from finetune.objectives.objective import Objective
from finetune.objectives.reconstruction import Reconstruction, activation_divergence
from finetune.preprocess import Items
from finetune.recipe import Augmentation, KlSparsity, L1Sparsity
from finetune.run_request import Cancelled
from models import registry
from models.autoencoders.autoencoder import Autoencoder
from models.autoencoders.vae import Vae
from models.network import Network
from models.spec import ModelSpec
from models.spec import Reconstruction as Task
from tests.finetune.small import Recorder, differing, digit_images, digit_vectors, fit, weights

NOTHING = torch.zeros(1, dtype=torch.int64)


def network(architecture: str, seed: int = 0, **hyperparameters: Any) -> Network:
    torch.manual_seed(seed)
    return registry.build(ModelSpec(architecture=architecture, hyperparameters=hyperparameters, task=Task()))


def reconstruction(**section: Any) -> Reconstruction:
    return Reconstruction(recipe.Reconstruction(**section))


def digits(first: int, last: int) -> Items:
    """Digits as vectors, without the pixels that are hardly ever lit."""
    data = load_digits().data
    data = data[first:last, data.std(axis=0) > 2.0].astype(np.float32)
    return Items(np.zeros(len(data), np.int64), None, np.arange(len(data)), lambda rows: {"vector": data[rows]})


def vectors(items: Items) -> Tensor:
    return torch.from_numpy(items.batch(np.arange(len(items)))["vector"])


def on_digits(objective: Objective, folder: Path, rate: float = 3e-3, **hyperparameters: Any) -> Autoencoder:
    """An autoencoder of 500 digits."""
    items = digits(0, 550)
    built = network("autoencoder", features=vectors(items).shape[1], **hyperparameters)
    built.measure(lambda: [vectors(items)], NOTHING)
    fit(built, items, folder, chosen=Chosen(epochs=20, batch_size=50, learning_rate=rate), objective=objective)
    assert isinstance(built, Autoencoder)
    return built


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"features": 6, "hidden": [], "code": 4, "code_activation": "sigmoid"},
        {"features": 6, "hidden": [9, 7], "code": 4, "activation": "tanh"},
        {"image_size": 16, "channels": [4, 4], "hidden": [], "code": 3, "activation": "gelu"},
    ],
)
def test_the_contraction_is_the_squared_norm_of_the_encoders_jacobian(hyperparameters: dict[str, Any]) -> None:
    built = network("autoencoder", **hyperparameters)
    assert isinstance(built, Autoencoder)
    raw = torch.randn(3, 6) if "features" in hyperparameters else torch.randint(0, 256, (3, 16, 16, 3)).byte()
    found = reconstruction(contraction=0.7).outputs(built, [raw], NOTHING, None)
    for row, norm in zip(built.trunk.units(raw), found["contraction"], strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: built.trunk.encode(x[None])[0], row)
        assert float(norm) == pytest.approx(float(jacobian.square().sum()), rel=1e-4)
    objective = reconstruction(contraction=0.7)
    expected = (found["error"].sum() + 0.7 * found["contraction"].sum()).item()
    assert objective.loss(found, NOTHING).item() == pytest.approx(expected, rel=1e-6)


def test_the_contraction_and_its_gradient_are_the_closed_form_of_a_sigmoid_layer() -> None:
    """Rifai et al. 2011, equation 7: Σ_j (h_j (1 - h_j))² Σ_i W_ji²."""
    built = network("autoencoder", features=6, hidden=[], code=4, code_activation="sigmoid").train()
    assert isinstance(built, Autoencoder)
    raw = torch.randn(5, 6)
    weight = built.trunk.code.weight
    code = built.trunk(raw)
    closed = ((code * (1 - code)).square() @ weight.square().sum(1)).sum()
    found = reconstruction(contraction=1.0).outputs(built, [raw], NOTHING, 0)["contraction"].sum()
    assert found.item() == pytest.approx(closed.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(closed, weight)  # type: ignore[arg-type]
    (actual,) = torch.autograd.grad(found, weight)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_denoiser_sees_corrupted_inputs_and_is_held_to_clean_ones_and_only_in_training() -> None:
    raw = torch.randn(2000, 6) * 5 + 3
    built = network("autoencoder", features=6)
    built.measure(lambda: [raw], NOTHING)
    assert isinstance(built, Autoencoder)
    clean = (raw - raw.mean(0)) / raw.std(0, correction=0)
    for section in ({"noise": 0.3}, {"masking": 0.4}):
        objective = reconstruction(**section)
        found = objective.outputs(built, [raw], NOTHING, 7)
        torch.testing.assert_close(found["clean"], clean, rtol=1e-4, atol=1e-5)
        difference = found["changed"] - found["clean"]
        if "noise" in section:
            assert float(difference.std()) == pytest.approx(0.3, rel=0.05)
        else:
            hidden = found["changed"] == 0.0
            assert float(hidden.float().mean()) == pytest.approx(0.4, abs=0.02)
            torch.testing.assert_close(found["changed"][~hidden], found["clean"][~hidden])
        decoded = built.decoder(built.trunk.encode(found["changed"]))
        torch.testing.assert_close(found["error"], (decoded - clean).square().mean(1), rtol=1e-4, atol=1e-5)
        measured = objective.outputs(built, [raw], NOTHING, None)
        assert torch.equal(measured["changed"], measured["clean"])


def test_a_denoiser_brings_back_what_was_corrupted(tmp_path: Path) -> None:
    plain = on_digits(reconstruction(), tmp_path / "plain", code=48)
    denoiser = on_digits(reconstruction(noise=1.0), tmp_path / "denoiser", code=48)
    errors = []
    for built in (plain, denoiser):
        torch.manual_seed(5)
        clean = built.trunk.units(vectors(digits(1000, 1200)))
        decoded = built.decoder(built.trunk.encode(clean + torch.randn_like(clean)))
        errors.append((decoded - clean).square().mean().item())
    assert errors[1] < 0.8 * errors[0]


def test_codes_are_as_sparse_as_they_are_asked_to_be(tmp_path: Path) -> None:
    held_out = vectors(digits(1000, 1200))
    for activation, sparsity in (("sigmoid", KlSparsity(weight=1.0)), ("relu", L1Sparsity(weight=0.03))):
        shape = {"hidden": [], "code": 32, "code_activation": activation, "rate": 0.04}
        free = on_digits(reconstruction(), tmp_path / f"free {activation}", **shape)
        sparse = on_digits(reconstruction(sparsity=sparsity), tmp_path / activation, **shape)
        with torch.no_grad():
            codes = [one(held_out)["embedding"] for one in (free, sparse)]
        if activation == "sigmoid":
            assert codes[0].mean() > 0.3
            assert codes[1].mean() < 0.12, "0.05 is asked for"
        else:
            on = [(one > 0).float().mean() for one in codes]
            assert on[1] < 0.5 * on[0]


def test_the_divergence_of_activations_is_that_of_coins() -> None:
    means = torch.tensor([0.01, 0.2, 0.9])
    coins = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(coins(torch.full((3,), 0.2)), coins(means)).sum()
    assert float(activation_divergence(means, 0.2)) == pytest.approx(float(expected), rel=1e-5)
    assert float(activation_divergence(torch.full((3,), 0.2), 0.2)) == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(activation_divergence(torch.tensor([0.0, 1.0]), 0.05))


def test_the_divergence_from_the_prior_is_torchs_and_what_sampling_finds() -> None:
    torch.manual_seed(0)
    outputs = {"embedding": 2.0 * torch.randn(5, 4), "log_variance": torch.randn(5, 4)}
    q = torch.distributions.Normal(outputs["embedding"], torch.exp(0.5 * outputs["log_variance"]))
    p = torch.distributions.Normal(0.0, 1.0)
    found = divergence(outputs)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(q, p), rtol=1e-4, atol=1e-5)
    z = q.sample((200_000,))
    torch.testing.assert_close((q.log_prob(z) - p.log_prob(z)).mean(0), found, rtol=0.03, atol=0.02)
    assert (found >= 0).all()
    assert (divergence({"embedding": torch.zeros(2), "log_variance": torch.zeros(2)}) == 0).all()


def test_the_gradient_through_what_is_drawn_is_that_of_the_expected_bound() -> None:
    """With linear maps and a normal likelihood the expectation over z is known: E‖x - Wz - b‖² = ‖x - Wμ - b‖² +
    Σ_j σ_j² ‖W_j‖²."""
    built = network("vae", features=4, hidden=[], latent=2).train()
    assert isinstance(built, Vae)
    with torch.no_grad():
        built.log_variance.bias.copy_(torch.tensor([-0.5, 0.3]))
        built.likelihood.log_variance.fill_(0.4)  # type: ignore[union-attr, operator]
    x = torch.randn(3, 4)
    parameters = list(built.parameters())
    mean, log_variance = built.trunk.code(x), built.log_variance(x)
    spread = built.decoder.spread
    squares = (x - spread(mean)).square().sum(1) + log_variance.exp() @ spread.weight.square().sum(0)  # type: ignore[operator]
    noise = built.likelihood.log_variance
    known = 0.5 * (squares * torch.exp(-noise) + 4 * (noise + np.log(2 * np.pi)))  # type: ignore[operator]
    known = known.sum() + 0.7 * divergence({"embedding": mean, "log_variance": log_variance}).sum()
    expected = torch.autograd.grad(known, parameters)

    objective, times = Elbo(recipe.Elbo(beta=0.7)), 40_000
    torch.manual_seed(1)
    outputs = objective.outputs(built, [x.repeat(times, 1)], NOTHING, 0)
    loss = objective.loss(outputs, NOTHING) / times
    assert loss.item() == pytest.approx(known.item(), rel=0.01)
    for found, true in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=0.05, atol=0.05)


def test_evaluations_draw_the_same_numbers_and_report_the_bound() -> None:
    items = digit_images(64)
    built = network("vae", image_size=16)
    pixels = np.repeat(np.repeat(items.batch(np.arange(64))["pixels"], 2, 1), 2, 2)
    items = Items(items.targets, None, np.arange(64), lambda rows: {"pixels": pixels[rows]})
    built.measure(lambda: [torch.from_numpy(pixels)], NOTHING)
    objective = Elbo(recipe.Elbo())
    torch.manual_seed(0)
    one = evaluate(built, items, objective, 32, lambda: None)
    torch.manual_seed(1)
    other = evaluate(built, items, objective, 32, lambda: None)
    assert one.loss == other.loss
    found = report(one, items, objective)
    figures = found.figures()
    assert figures["loss"] == pytest.approx(one.loss, rel=1e-5)
    assert figures["loss"] == pytest.approx(figures["surprise"] + figures["kl"], rel=1e-6)
    served = built(torch.from_numpy(pixels))["error"]
    assert figures["error"] == pytest.approx(float(served.mean()), rel=1e-4), "of the mean, as it is served"
    x = pixels / 255.0
    variance = np.square(x - x.mean(0)).mean()
    assert figures["explained_variance"] == pytest.approx(1 - figures["error"] / variance, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("architecture", "hyperparameters", "objective"),
    [
        (
            "autoencoder",
            {"code": 8, "code_activation": "sigmoid"},
            reconstruction(noise=0.3, masking=0.1, sparsity=KlSparsity(), contraction=0.01),
        ),
        ("vae", {"latent": 4}, Elbo(recipe.Elbo())),
    ],
)
def test_a_run_interrupted_at_any_step_ends_with_the_same_weights_bit_for_bit(
    architecture: str, hyperparameters: dict[str, Any], objective: Objective, tmp_path: Path
) -> None:
    items = digit_vectors(130)
    chosen = Chosen(epochs=3, batch_size=8, learning_rate=0.01)
    given: dict[str, Any] = {
        "chosen": chosen,
        "objective": objective,
        "checkpoint_seconds": 0.0,
        "gradient_accumulation": 2,
        "augmentation": Augmentation(),
    }
    undisturbed = network(architecture, features=64, hidden=[16], **hyperparameters)
    expected = fit(undisturbed, items, tmp_path / "whole", **given)
    for seed, question in enumerate((2, 7, 9)):
        other = network(architecture, seed, features=64, hidden=[16], **hyperparameters)
        with pytest.raises(Cancelled):
            fit(other, items, tmp_path / "parts", Recorder(question), **given)
    last = network(architecture, 9, features=64, hidden=[16], **hyperparameters)
    assert fit(last, items, tmp_path / "parts", **given) == expected
    assert differing(weights(undisturbed), weights(last)) == set()
    assert {"code", "decoder.spread"} <= expected.gradient_norms[0].norms.keys()
    assert all(norm > 0.0 for norm in expected.gradient_norms[-1].norms.values())
