"""Network: a trunk that turns inputs into features, and a head that turns features into the task's answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.spec import Classification, Embedding, ModelSpec


class Trunk(nn.Module):
    """Inputs to features. `width`: length of the feature vector; `input_names`: names of forward's tensors."""

    width: int
    input_names: tuple[str, ...]

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Named blocks from the input to the head; every parameter is in exactly one."""
        raise NotImplementedError


class Network(nn.Module):
    """A trunk and, for classification, dropout and a linear head. `spec` is complete: it rebuilds this network."""

    def __init__(self, spec: ModelSpec, trunk: Trunk, dropout: float) -> None:
        super().__init__()
        self.spec = spec
        self.trunk = trunk
        self.dropout = nn.Dropout(dropout)
        self.head: nn.Linear | None = None
        match spec.task:
            case Classification(classes):
                self.head = nn.Linear(trunk.width, classes)
            case Embedding():
                pass
            case None:
                raise ValueError(f"{spec.architecture}: the task is open; a network is built for a complete ModelSpec")

    @property
    def width(self) -> int:
        return self.trunk.width

    @property
    def input_names(self) -> tuple[str, ...]:
        return self.trunk.input_names

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return self.trunk.blocks()

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """`inputs` in the order of `input_names` → `embedding` float32 [batch, width] and, with a head, `logits`
        float32 [batch, classes]."""
        embedding = self.trunk(*inputs)
        if self.head is None:
            return {"embedding": embedding}
        return {"logits": self.head(self.dropout(embedding)), "embedding": embedding}


class Normalize(nn.Module):
    """Pixels as they are sent to what a convolution wants: uint8 [batch, height, width, 3] → float32 [batch, 3,
    height, width], (x / 255 - mean) / std, inside the graph so that serving cannot normalize otherwise."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float32))
        shift = -torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift
