"""Convolutions along a sequence: in stages over a series, side by side over a text. Padding does not matter.

Series: Wang, Yan and Oates 2017 ("Time series classification from scratch with deep neural networks": convolution,
batch norm, ReLU, three times, and the average over time), with pooling between the stages for long series.
Texts: Kim 2014 ("Convolutional neural networks for sentence classification"), with batch norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import catalog
from models.network import Headed, Network, Trunk
from models.sequences import Series, Tokens, first_layer
from models.spec import ModelSpec

STAGES = (7, 5, 3)
SIDE_BY_SIDE = (3, 4, 5)


class StepNorm(nn.BatchNorm1d):
    """Batch norm (Ioffe and Szegedy 2015) whose statistics are those of real steps: padding is no data."""

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: float32 [batch, width, length]; mask: bool [batch, length]."""
        if not self.training:
            return self(x)  # type: ignore[no-any-return]
        steps = x.transpose(1, 2)
        normed = torch.zeros_like(steps)
        normed[mask] = self(steps[mask]).to(steps.dtype)
        return normed.transpose(1, 2)


class Convolution(nn.Module):
    """Width `window` along the length, norm and ReLU; float32 [batch, inputs, length] → [batch, outputs, length], 0
    where there is padding."""

    def __init__(self, inputs: int, outputs: int, window: int) -> None:
        super().__init__()
        self.ends = ((window - 1) // 2, window // 2)
        self.conv = nn.Conv1d(inputs, outputs, window, bias=False)
        self.norm = StepNorm(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm.masked(self.conv(functional.pad(x, self.ends)), mask)
        return torch.relu(y) * mask.unsqueeze(1)


class Stages(Trunk):
    """float32 [batch, length, channels] → float32 [batch, width]: convolutions one behind the other, the length halved
    between them, and the average over what is left."""

    def __init__(self, first: Series, windows: tuple[int, ...], width: int, pooling: bool) -> None:
        super().__init__()
        self.first = first
        self.input_names = first.input_names
        self.width = width
        self.pooling = pooling
        self.stages = nn.ModuleList(
            Convolution(width if i else first.width, width, window) for i, window in enumerate(windows)
        )

    def measure(self, inputs: Callable[[], list[Tensor]]) -> None:
        self.first.measure(inputs)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [(f"stage{i}", stage) for i, stage in enumerate(self.stages)]

    def forward(self, series: Tensor, attention_mask: Tensor) -> Tensor:
        x, mask = self.first(series, attention_mask).transpose(1, 2), attention_mask.bool()
        for i, stage in enumerate(self.stages):
            if i and self.pooling:
                # Behind a ReLU, zero padding never wins. One more makes an odd last step a pair. In two dimensions,
                # since the exporter freezes the length for PyTorch's pooling in one.
                x = functional.max_pool2d(functional.pad(x, (0, 1)).unsqueeze(2), (1, 2)).squeeze(2)
                mask = mask[:, ::2]
            x = stage(x, mask)
        features: Tensor = x.sum(2) / mask.sum(1, keepdim=True)
        return features


class SideBySide(Trunk):
    """int64 [batch, sequence] → float32 [batch, windows · width]: where in the text each filter answers most, and how
    much."""

    def __init__(self, first: Tokens, windows: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.first = first
        self.input_names = first.input_names
        self.width = width * len(windows)
        self.convolutions = nn.ModuleList(Convolution(first.width, width, window) for window in windows)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [("tokens", self.first), ("convolutions", self.convolutions)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, mask = self.first(input_ids, attention_mask).transpose(1, 2), attention_mask.bool()
        return torch.cat([convolution(x, mask).amax(2) for convolution in self.convolutions], dim=1)


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when what the network reads is still open."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.Convnet1dParameters)
    first = first_layer(spec.architecture, parameters)
    trunk: Trunk
    if isinstance(first, Series):
        trunk = Stages(first, parameters.windows or STAGES, parameters.width, parameters.pooling)
    else:
        trunk = SideBySide(first, parameters.windows or SIDE_BY_SIDE, parameters.width)
    return Headed(spec, trunk, parameters.dropout)
