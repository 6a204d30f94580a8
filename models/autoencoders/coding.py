"""Encoder and decoder, mirror images of each other: dense layers, with strided convolutions before them for images."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from models import catalog
from models.autoencoders.units import PixelUnits, VectorUnits
from models.hidden import ELEMENTWISE, SATURATING, Dense
from models.network import Trunk

CHANNELS = (16, 32)
# Numbers in the code of an image where the hyper-parameters leave it open.
IMAGE_CODE = 32


class Convolution(nn.Module):
    """A 3 × 3 convolution with stride 2: float32 [batch, inputs, n, n] → [batch, outputs, ⌈n / 2⌉, ⌈n / 2⌉]. No batch
    norm: what an item is coded as follows from this item alone."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.activation = ELEMENTWISE[activation]
        initialize(self.conv, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


class Transposed(nn.Module):
    """The transposed convolution back from side ⌈n / 2⌉ to n. activation: None for the last one."""

    def __init__(self, inputs: int, outputs: int, side: int, activation: str | None) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1 - side % 2)
        self.activation = ELEMENTWISE[activation] if activation else None
        initialize(self.conv, activation)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return self.activation(y) if self.activation else y


class Encoder(Trunk):
    """vector float32 [batch, features] or pixels uint8 [batch, size, size, 3] → code float32 [batch, width]."""

    def __init__(
        self,
        units: VectorUnits | PixelUnits,
        channels: tuple[int, ...],
        hidden: tuple[int, ...],
        code: int,
        activation: str,
        code_activation: Literal["linear", "relu", "sigmoid", "tanh"],
    ) -> None:
        super().__init__()
        self.units = units
        self.input_names = ("pixels",) if isinstance(units, PixelUnits) else ("vector",)
        self.stages = nn.ModuleList(Convolution(i, o, activation) for i, o in pairwise((3, *channels)))
        left, *_ = flattened(units.shape, channels)
        self.features_width = (left, *hidden)[-1]
        self.layers = nn.ModuleList(Dense(i, o, activation, 0.0) for i, o in pairwise((left, *hidden)))
        self.code = (
            affine(self.features_width, code)
            if code_activation == "linear"
            else Dense(self.features_width, code, code_activation, 0.0)
        )
        self.width = code

    def measure(self, inputs: Callable[[], list[Tensor]]) -> None:
        self.units.fit(inputs()[0])

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [
            *((f"stage{i}", stage) for i, stage in enumerate(self.stages)),
            *((f"hidden{i}", layer) for i, layer in enumerate(self.layers)),
            ("code", self.code),
        ]

    def features(self, x: Tensor) -> Tensor:
        """What stands before the code, from inputs in their units: float32 [batch, features_width]."""
        for stage in self.stages:
            x = stage(x)
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return x

    def encode(self, x: Tensor) -> Tensor:
        """The code of inputs in their units."""
        code: Tensor = self.code(self.features(x))
        return code

    def forward(self, raw: Tensor) -> Tensor:
        return self.encode(self.units(raw))


class Decoder(nn.Module):
    """code float32 [batch, code] → float32 [batch, features] or [batch, 3, size, size]: linear at its end."""

    def __init__(
        self, shape: tuple[int, ...], channels: tuple[int, ...], hidden: tuple[int, ...], code: int, activation: str
    ) -> None:
        super().__init__()
        numbers, sides = flattened(shape, channels)
        widths = (code, *reversed(hidden))
        self.layers = nn.ModuleList(Dense(i, o, activation, 0.0) for i, o in pairwise(widths))
        self.grown = (channels[-1], sides[-1], sides[-1]) if channels else shape
        self.spread = Dense(widths[-1], numbers, activation, 0.0) if channels else affine(widths[-1], numbers)
        back = list(zip(pairwise((*reversed(channels), 3)), reversed(sides[:-1]), strict=True))
        self.stages = nn.ModuleList(
            Transposed(inputs, outputs, side, activation if i < len(back) - 1 else None)
            for i, ((inputs, outputs), side) in enumerate(back)
        )

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [
            *((f"decoder.hidden{i}", layer) for i, layer in enumerate(self.layers)),
            ("decoder.spread", self.spread),
            *((f"decoder.stage{i}", stage) for i, stage in enumerate(self.stages)),
        ]

    def forward(self, code: Tensor) -> Tensor:
        for layer in self.layers:
            code = layer(code)
        x: Tensor = self.spread(code).unflatten(1, self.grown)
        for stage in self.stages:
            x = stage(x)
        return x


def flattened(shape: tuple[int, ...], channels: tuple[int, ...]) -> tuple[int, list[int]]:
    """How many numbers convolutions to these channels leave of an input, and the sides of the image before each and
    behind the last."""
    if not channels:
        return int(torch.Size(shape).numel()), []
    sides = [shape[-1]]
    for _ in channels:
        sides.append((sides[-1] + 1) // 2)
    return channels[-1] * sides[-1] ** 2, sides


def affine(inputs: int, outputs: int) -> nn.Linear:
    """W x + b with Glorot's weights."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def initialize(layer: nn.Conv2d | nn.ConvTranspose2d, activation: str | None) -> None:
    """He's weights, or half their variance where the activation is none of the ReLU family."""
    # With stride 2, a quarter of a transposed kernel meets any one output.
    meeting = layer.in_channels * 9 / (4 if isinstance(layer, nn.ConvTranspose2d) else 1)
    gain = 1.0 if activation is None or activation in SATURATING else 2.0
    nn.init.normal_(layer.weight, std=math.sqrt(gain / meeting))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def units(architecture: str, parameters: catalog.CodingParameters) -> VectorUnits | PixelUnits:
    """Raises ValueError when what the network reads is still open, or is two things at once."""
    if parameters.features is not None and parameters.image_size is not None:
        raise ValueError(f"{architecture}: `features` are of vectors and `image_size` is of images; give one")
    if parameters.features is not None:
        return VectorUnits(parameters.features)
    if parameters.image_size is None:
        raise ValueError(
            f"{architecture}: what it reads is open; `features` or `image_size` is taken from the training data, or "
            "given as a hyper-parameter"
        )
    return PixelUnits(parameters.image_size)


def channels(architecture: str, parameters: catalog.CodingParameters) -> tuple[int, ...]:
    """Of the convolutions; none for vectors. Raises ValueError when a network for vectors asks for some."""
    if parameters.features is None:
        return CHANNELS if parameters.channels is None else parameters.channels
    if parameters.channels:
        raise ValueError(f"{architecture}: `channels` are of images, and this one reads vectors")
    return ()
