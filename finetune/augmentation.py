"""Random changes to training images, on the device they train on."""

from __future__ import annotations

from typing import cast

import kornia.augmentation as kornia
import torch
from torch import Tensor, nn

from finetune.recipe import Augmentation


class Augment:
    """Rotation, translation, scaling, mirroring and colour jitter of image batches, as the recipe says.

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

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [batch, height, width, channels] to the same."""
        scaled = pixels.permute(0, 3, 1, 2).float() / 255.0
        changed = self.steps(scaled).mul(255.0).round().clamp(0.0, 255.0)
        return cast(Tensor, changed.to(torch.uint8).permute(0, 2, 3, 1))


def build(section: Augmentation) -> Augment | None:
    """None when the recipe asks for nothing."""
    return None if section == Augmentation() else Augment(section)
