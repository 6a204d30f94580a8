"""A space in which sets of images are compared: the principal components of the training images' pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# Larger images are averaged down to this side; so many components are kept.
SIDE = 32
COMPONENTS = 32


class ImageSpace(nn.Module):
    """float32 [batch, 3, size, size] → [batch, 32]: where images lie along the principal components of the training
    images, in units in which those have a total variance of 1.

    Its buffers also hold each pixel's own mean and deviation: what a model knows that sees no pixel beside another.
    """

    mean: Tensor
    deviation: Tensor
    components: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.side = min(size, SIDE)
        self.pixels = 3 * self.side * self.side
        self.register_buffer("mean", torch.zeros(self.pixels))
        self.register_buffer("deviation", torch.zeros(self.pixels))
        self.register_buffer("components", torch.zeros(self.pixels, COMPONENTS))

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Fit the space to float32 [images, 3, size, size]; fewer images than components leave the rest at zero."""
        values = self._values(images)
        self.mean.copy_(values.mean(0))
        self.deviation.copy_(values.std(0, correction=0))
        centred = values - self.mean
        found = min(COMPONENTS, *centred.shape)
        with torch.random.fork_rng(devices=[]):  # the same images have the same space, whatever the seed of the run
            torch.manual_seed(0)
            directions = torch.pca_lowrank(centred, q=found, center=False, niter=4)[2]
        self.components.zero_()
        self.components[:, :found] = directions / self.deviation.square().sum().clamp(min=1e-12).sqrt()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = (self._values(images) - self.mean) @ self.components
        return features

    def independent_pixels(self, noise: Tensor) -> Tensor:
        """Features [batch, 32] of images whose pixels are drawn each by itself, from noise float32 [batch, pixels]."""
        features: Tensor = (noise * self.deviation) @ self.components
        return features

    def _values(self, images: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(images.float(), self.side).flatten(1)
