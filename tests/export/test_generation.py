"""How generated images are measured, and the latent vectors they are made from."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from export.processing.inputs import BadInput
from export.processing.latents import between, drawn, given
from export.reports.generation import evaluation, frechet_distance, grid


def test_the_frechet_distance_of_normal_distributions_that_have_one_in_closed_form() -> None:
    """Of independent features: Σ (μ₁ - μ₂)² + (σ₁ - σ₂)²; a rotation of both changes nothing."""
    random = np.random.default_rng(0)
    noise = random.standard_normal((500, 3))
    noise -= noise.mean(axis=0)
    noise = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise, rowvar=False, bias=True))).T  # exactly white
    one = noise * [1.0, 2.0, 3.0] + [0.0, 1.0, 0.0]
    other = noise[:, [1, 0, 2]] * [2.0, 2.0, 1.0] + [1.0, 1.0, 0.0]
    assert frechet_distance(one, other) == pytest.approx(1.0 + (1 + 0 + 4), rel=1e-9)
    rotation = np.linalg.qr(random.standard_normal((3, 3)))[0]
    assert frechet_distance(one @ rotation, other @ rotation) == pytest.approx(6.0, rel=1e-9)
    assert frechet_distance(one, one[::-1]) == pytest.approx(0.0, abs=1e-9)
    flat = np.zeros((500, 3))
    assert frechet_distance(one, flat) == pytest.approx(1.0 + 1 + 4 + 9, rel=1e-9), "all its variance, and the gap"


def test_the_report_of_a_perfect_and_of_a_blind_generator(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    real = random.standard_normal((400, 32))
    kept = {
        "real": np.full(400, 2.0),
        "generated": np.r_[np.full(100, -2.0), np.full(300, 2.0)],
        "real_features": real,
        "generated_features": random.permutation(real),
        "independent_features": np.zeros((400, 32)),
        "image": random.integers(0, 256, (400, 8, 8, 3), dtype=np.uint8),
        "discriminator_loss": np.full(400, 1.0),
        "generator_loss": np.full(400, 2.0),
    }
    report = evaluation(kept, 1.5)
    assert report.frechet_distance == pytest.approx(0.0, abs=1e-9)
    assert report.frechet_independent == pytest.approx(32.0, rel=0.1)
    assert 0.0 < report.frechet_held_out < 6.0
    assert report.discriminator_accuracy == pytest.approx((1.0 + 0.25) / 2)
    assert report.figures()["loss"] == 1.5
    assert "samples" not in report.figures()
    report.plot(tmp_path / "evaluation.png")
    assert Image.open(tmp_path / "evaluation.png").size[0] > 1000
    written = msgspec.json.decode(msgspec.json.encode(report))
    assert isinstance(written["images"], str)
    picture = np.asarray(Image.open(io.BytesIO(report.images)))
    assert picture.shape == (48, 48, 3)
    np.testing.assert_array_equal(picture[8:16, 16:24], kept["image"][8])
    assert "| frechet distance | 0.0000 |" in report.words()


def test_fewer_images_than_a_grid_leave_white() -> None:
    images = np.zeros((7, 4, 4, 3), np.uint8)
    found = grid(images)
    assert found.shape == (8, 24, 3)
    assert (found[4:, 4:] == 255).all()
    assert not found[:4].any()


def test_vectors_drawn_from_a_seed_do_not_depend_on_how_many_follow() -> None:
    many = drawn(5, 100, 32)
    np.testing.assert_array_equal(drawn(5, 1, 32)[0], many[0])
    assert many.dtype == np.float32
    assert abs(float(many.mean())) < 0.05
    assert float(many.std()) == pytest.approx(1.0, abs=0.05)
    assert not np.array_equal(drawn(6, 1, 32)[0], many[0])


def test_the_way_between_two_vectors_is_a_circle_with_exact_ends() -> None:
    start, end = drawn(1, 2, 64)
    way = between(start, end, 11)
    np.testing.assert_array_equal(way[0], start)
    np.testing.assert_array_equal(way[-1], end)
    one, other = np.array([2.0, 0.0, 0.0], np.float32), np.array([0.0, 2.0, 0.0], np.float32)
    circle = between(one, other, 7)
    np.testing.assert_allclose(np.linalg.norm(circle, axis=1), 2.0, rtol=1e-6)
    angles = np.degrees(np.arctan2(circle[:, 1], circle[:, 0]))
    np.testing.assert_allclose(angles, np.linspace(0, 90, 7), atol=1e-4)


@pytest.mark.parametrize("end", [[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]])
def test_a_way_that_is_no_circle_is_a_line(end: list[float]) -> None:
    way = between(np.ones(2, np.float32), np.array(end, np.float32), 3)
    np.testing.assert_allclose(way, [[1, 1], (np.ones(2) + end) / 2, end], atol=1e-6)


def test_a_vector_of_a_client_is_looked_at() -> None:
    np.testing.assert_array_equal(given([1, 2.5], 2, "latent 0"), np.array([1, 2.5], np.float32))
    with pytest.raises(BadInput, match="latent 3 has 1 numbers; this model takes 2"):
        given([1], 2, "latent 3")
    with pytest.raises(BadInput, match="finite"):
        given([1, 1e39], 2, "latent 0")
