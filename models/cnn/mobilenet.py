"""MobileNet: Howard et al. 2017 ("MobileNets: efficient convolutional neural networks for mobile vision")."""

from __future__ import annotations

from torch import nn

from models import catalog
from models.cnn.convolution import ConvNorm, Pooled, scaled
from models.network import Headed, Network
from models.spec import ModelSpec

# Channels and stride of each depthwise separable layer (table 1 of the paper).
LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
# The first convolution halves the side of images of ImageNet's size; smaller ones keep theirs.
SMALL = 96


class MobileNet(Pooled):
    """uint8 [batch, size, size, 3] → float32 [batch, 1024 · width]. `width` is the paper's α.

    Each layer is a 3 × 3 convolution of every channel by itself, then a 1 × 1 across channels, both with norm and ReLU.
    """

    block_name = "layer"

    def __init__(self, image_size: int, width: float) -> None:
        inputs = scaled(32, width)
        stem = ConvNorm(3, inputs, 3, 2 if image_size >= SMALL else 1)
        layers: list[nn.Module] = []
        for channels, stride in LAYERS:
            outputs = scaled(channels, width)
            layers.append(
                nn.Sequential(ConvNorm(inputs, inputs, 3, stride, groups=inputs), ConvNorm(inputs, outputs, 1))
            )
            inputs = outputs
        super().__init__(stem, layers, inputs)


def build(spec: ModelSpec) -> Network:
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.CnnParameters)
    return Headed(spec, MobileNet(parameters.image_size, parameters.width), parameters.dropout)
