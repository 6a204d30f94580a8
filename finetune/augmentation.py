"""Random changes to training images and texts, on the device they train on."""

from __future__ import annotations

from dataclasses import dataclass

import kornia.augmentation as kornia
import torch
from torch import Tensor, nn

from finetune.recipe import Augmentation


@dataclass(frozen=True)
class Mix:
    """Every image is `share` of itself and 1 - share of image partners[i], int64 [batch]; and so is its loss."""

    share: float
    partners: Tensor


class Augment:
    """Rotation, translation, scaling, crops, mirroring, colour jitter, noise and mixing of images, as the recipe says.

    Each image of a batch is changed differently; torch's global generator decides how. What an affine change uncovers
    is filled with the nearest border pixel: zeros would teach the network black corners.
    """

    def __init__(self, section: Augmentation) -> None:
        steps: list[nn.Module] = []
        if section.flip:
            steps.append(kornia.RandomHorizontalFlip(p=section.flip))
        if section.rotation or section.translation or section.scale:
            steps.append(
                kornia.RandomAffine(
                    degrees=section.rotation,
                    translate=(section.translation, section.translation),
                    scale=(1.0 - section.scale, 1.0 + section.scale),
                    padding_mode="border",
                    p=1.0,
                )
            )
        if section.colour:
            steps.append(kornia.ColorJitter(section.colour, section.colour, section.colour, p=1.0))
        self.steps = nn.Sequential(*steps)
        self.section = section

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Mix | None]:
        """uint8 [batch, height, width, channels] to the same, and how its images are mixed, if they are."""
        changed: Tensor = self.steps(pixels.permute(0, 3, 1, 2).float() / 255.0)
        if self.section.crop:
            changed = cropped(changed, self.section.crop)
        mix = None
        ways = [(self.section.mixup, blended), (self.section.cutmix, pasted)]
        ways = [(alpha, way) for alpha, way in ways if alpha]
        if ways:
            alpha, way = ways[int(torch.randint(len(ways), ()))]
            partners = torch.randperm(len(changed)).to(changed.device)
            changed, share = way(changed, partners, float(torch.distributions.Beta(alpha, alpha).sample()))
            mix = Mix(share, partners)
        if self.section.noise:
            changed = changed + self.section.noise * torch.randn_like(changed)
        changed = changed.mul(255.0).round().clamp(0.0, 255.0)
        return changed.to(torch.uint8).permute(0, 2, 3, 1), mix


def cropped(images: Tensor, most: float) -> Tensor:
    """Of each image a square of at least 1 - most of its sides, from anywhere inside, brought back to size: float32
    [batch, channels, height, width]."""
    kept = 1.0 - most * torch.rand(len(images), 1)
    # Of a window that reaches from -1 to 1, its centre stays 1 - kept away from the edge.
    centres = (1.0 - kept) * (2.0 * torch.rand(len(images), 2) - 1.0)
    windows = torch.zeros(len(images), 2, 3)
    windows[:, 0, 0] = windows[:, 1, 1] = kept[:, 0]
    windows[:, :, 2] = centres
    grid = nn.functional.affine_grid(windows.to(images), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def blended(images: Tensor, partners: Tensor, share: float) -> tuple[Tensor, float]:
    """share · x_i + (1 - share) · x_partner: float32 [batch, channels, height, width]."""
    return share * images + (1.0 - share) * images[partners], share


def pasted(images: Tensor, partners: Tensor, share: float) -> tuple[Tensor, float]:
    """Each image with a rectangle of its partner's in it, of 1 - share of the area; and the share that is left, which
    is more where the rectangle reaches over the edge."""
    height, width = images.shape[2:]
    side = (1.0 - share) ** 0.5
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    half_y, half_x = round(height * side / 2), round(width * side / 2)
    top, bottom = max(0, y - half_y), min(height, y + half_y)
    left, right = max(0, x - half_x), min(width, x + half_x)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
    return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)


def drop_words(attention_mask: Tensor, share: float) -> Tensor:
    """The mask int64 [batch, length] without `share` of its tokens; the first one, which may stand for all, stays."""
    kept = torch.rand(attention_mask.shape, device=attention_mask.device) >= share
    kept[:, 0] = True
    return attention_mask * kept


def build(section: Augmentation) -> Augment | None:
    """None when the recipe asks for no change of images."""
    return None if section.misplaced("text") in (None, "smote") else Augment(section)
