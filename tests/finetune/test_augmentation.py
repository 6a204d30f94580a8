"""Random changes to training images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune import augmentation
from finetune.recipe import Augmentation


def images(count: int = 8) -> Tensor:
    """uint8 [count, 16, 16, 3], a bright square off the centre."""
    pixels = torch.full((count, 16, 16, 3), 20, dtype=torch.uint8)
    pixels[:, 3:7, 4:9] = torch.tensor([220, 120, 60], dtype=torch.uint8)
    return pixels


def augmented(seed: int = 0, **fields: float) -> Tensor:
    augment = augmentation.build(Augmentation(**fields))
    assert augment is not None
    torch.manual_seed(seed)
    changed, mix = augment(images())
    assert mix is None
    return changed


def mixed(pixels: Tensor, seed: int = 0, **fields: float) -> tuple[Tensor, augmentation.Mix]:
    augment = augmentation.build(Augmentation(**fields))
    assert augment is not None
    torch.manual_seed(seed)
    changed, mix = augment(pixels)
    assert mix is not None
    return changed, mix


def shades(count: int = 8) -> Tensor:
    """uint8 [count, 16, 16, 3], each image of one shade."""
    return (torch.arange(count) * 20).to(torch.uint8)[:, None, None, None].expand(count, 16, 16, 3)


def test_mixup_blends_each_image_with_its_partner_by_the_share_of_the_loss() -> None:
    shares = set()
    for seed in range(20):
        changed, mix = mixed(shades(), seed, mixup=0.4)
        own, partner = torch.arange(8) * 20.0, mix.partners * 20.0
        expected = mix.share * own + (1 - mix.share) * partner
        assert (changed[:, 3, 5, 1] - expected).abs().max() <= 1.0
        assert sorted(mix.partners.tolist()) == list(range(8))
        shares.add(mix.share)
    assert len(shares) == 20
    assert max(shares) > 0.8
    assert min(shares) < 0.2


def test_cutmix_pastes_a_rectangle_of_the_partner_and_counts_its_pixels() -> None:
    for seed in range(20):
        changed, mix = mixed(shades(), seed, cutmix=1.0)
        for i, partner in enumerate(mix.partners.tolist()):
            own = (changed[i] == 20 * i).float().mean()
            assert set(changed[i].unique().tolist()) <= {20 * i, 20 * partner}
            if partner != i:
                assert float(own) == pytest.approx(mix.share, abs=1e-6)


def test_with_both_a_coin_decides() -> None:
    kinds = {len(mixed(shades(), seed, mixup=1.0, cutmix=1.0)[0][1].unique()) for seed in range(20)}
    assert kinds == {1, 2}


def test_words_are_dropped_by_their_share_and_padding_and_the_first_stay() -> None:
    torch.manual_seed(0)
    mask = torch.ones(200, 50, dtype=torch.int64)
    mask[:, 30:] = 0
    found = augmentation.drop_words(mask, 0.3)
    assert found.dtype == torch.int64
    assert not found[:, 30:].any()
    assert found[:, 0].all()
    assert float(found[:, 1:30].float().mean()) == pytest.approx(0.7, abs=0.02)
    assert len({row.numpy().tobytes() for row in found}) == 200


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    found = augmented(noise=0.05).float() - images().float()
    assert float(found[:, 8:].std()) == pytest.approx(0.05 * 255, rel=0.1)
    assert abs(float(found[:, 3:7, 4:9].mean())) < 1.5


def test_a_recipe_that_asks_for_nothing_gets_nothing() -> None:
    assert augmentation.build(Augmentation()) is None


def test_mirroring_is_exact() -> None:
    assert torch.equal(augmented(flip=1.0), images().flip(2))
    some = augmented(flip=0.5)
    mirrored = [torch.equal(one, images()[0].flip(1)) for one in some]
    assert any(mirrored)
    assert not all(mirrored)


@pytest.mark.parametrize(
    "field", [{"rotation": 30.0}, {"translation": 0.2}, {"scale": 0.3}, {"crop": 0.4}, {"colour": 0.5}]
)
def test_every_image_is_changed_in_its_own_way_and_by_the_seed(field: dict[str, float]) -> None:
    found = augmented(**field)
    assert found.shape == (8, 16, 16, 3)
    assert found.dtype == torch.uint8
    assert torch.equal(found, augmented(**field))
    assert not torch.equal(found, augmented(seed=1, **field))
    assert len({one.numpy().tobytes() for one in found}) == 8


def test_translation_stays_within_its_share_of_the_side() -> None:
    weights = (augmented(translation=0.25)[..., 0].float() - 20.0).clamp(min=0.0)
    rows = (weights.sum(dim=2) * torch.arange(16.0)).sum(dim=1) / weights.sum(dim=(1, 2))
    shift = rows - 4.5
    assert shift.abs().max() <= 4.0 + 0.1
    assert shift.abs().max() > 0.5


def test_a_crop_shows_a_window_from_inside_the_image_at_full_size() -> None:
    side, most = 32, 0.5
    ramp = (torch.arange(side * 1.0) * 6.0 + 20.0).to(torch.uint8)
    pixels = torch.stack([ramp[:, None].expand(side, side), ramp[None].expand(side, side), ramp.expand(side, side)], 2)
    torch.manual_seed(0)
    augment = augmentation.build(Augmentation(crop=most))
    assert augment is not None
    found = (augment(pixels.expand(64, -1, -1, -1))[0].float() - 20.0) / 6.0  # rows and columns of the original
    for rows in (found[:, :, side // 2, 0], found[:, side // 2, :, 1]):
        height = (rows[:, -1] - rows[:, 0]) / (side - 1)
        assert 1.0 - most - 0.01 <= float(height.min()) < 0.6
        assert 0.9 < float(height.max()) <= 1.0
        middle = rows.mean(dim=1) - (side - 1) / 2
        assert (middle.abs() <= (1.0 - height) * side / 2 + 0.3).all()
        assert middle.std() > 1.0
    torch.testing.assert_close(
        found[:, -1, 5, 0] - found[:, 0, 5, 0], found[:, 5, -1, 1] - found[:, 5, 0, 1], atol=0.4, rtol=0.0
    )


def test_a_small_rotation_keeps_the_square_and_no_corner_turns_black() -> None:
    found = augmented(rotation=15.0)
    assert int(found.min()) >= 19
    assert (found[..., 0].float().mean() - images()[..., 0].float().mean()).abs() < 3.0


def test_colour_changes_what_geometry_leaves_alone() -> None:
    found = augmented(colour=0.4).float()
    assert found.mean(dim=(1, 2, 3)).std() > 1.0
    brighter = found[:, 3:7, 4:9].mean(dim=(1, 2, 3)) > found[:, 10:, 10:].mean(dim=(1, 2, 3))
    assert bool(brighter.all())
