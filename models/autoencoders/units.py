"""The units that inputs are reconstructed in: centred on the training data, and the way back to raw inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.mlp import Standardize

# Images that are averaged at once: as floats they take four times their room.
AT_ONCE = 256


class VectorUnits(Standardize):
    """float32 [batch, features] in deviations of each number from its mean."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.shape = (features,)

    def back(self, x: Tensor) -> Tensor:
        """Standardized numbers to those of the data."""
        return x * self.std + self.mean


class PixelUnits(nn.Module):
    """uint8 [batch, size, size, 3] to float32 [batch, 3, size, size]: intensities from 0 to 1, less those of the mean
    image of the training data, so that 0 is what is expected where nothing is known."""

    mean: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shape = (3, size, size)
        self.register_buffer("mean", torch.full(self.shape, 0.5))

    def fit(self, pixels: Tensor) -> None:
        """Take the mean image of `pixels` uint8 [items, size, size, 3]."""
        total = torch.zeros(pixels.shape[1:], dtype=torch.float64)
        for some in torch.split(pixels, AT_ONCE):
            total += some.double().sum(dim=0)
        self.mean.copy_((total / (255.0 * len(pixels))).permute(2, 0, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.permute(0, 3, 1, 2).float() / 255.0 - self.mean

    def back(self, x: Tensor) -> Tensor:
        """The nearest image: uint8 [batch, size, size, 3]."""
        pixels = ((x + self.mean) * 255.0).round().clamp(0.0, 255.0)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1)
