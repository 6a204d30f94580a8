"""Network: what a ModelSpec is built into. Most are a trunk that turns inputs into features and a head for the task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import heads
from models.spec import Embedding, HeadTask, ModelSpec, MultiTask, Task, tag

# Dynamic axes of inputs, behind the batch.
AXES: Mapping[str, Mapping[int, str]] = {
    "input_ids": {1: "sequence"},
    "attention_mask": {1: "sequence"},
    "series": {1: "sequence"},
}
HEADED = HeadTask | MultiTask | Embedding


@dataclass(frozen=True)
class Graph:
    """One ONNX graph of a network.

    module: called with its inputs in the order of `inputs`, answers a dict of tensors that has all `outputs`.
    axes: dynamic axes of the inputs, behind the batch: {"input_ids": {1: "sequence"}}.
    examples: from a batch of the network's own inputs to inputs of this graph. It is traced with the first, and PyTorch
        and ONNX Runtime are compared on all.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]
    examples: Callable[[dict[str, Tensor]], list[dict[str, Tensor]]]


class Network(nn.Module):
    """`spec` is complete: it rebuilds this network. `input_names`: of forward's tensors; `output_names`: those of its
    answers that are exported."""

    spec: ModelSpec
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Named blocks from the input to the output; every parameter outside of a head is in exactly one."""
        raise NotImplementedError

    def measure(self, inputs: Callable[[], list[Tensor]], targets: Tensor) -> None:
        """Before the first step: take the statistics of all training inputs and targets that are kept as buffers."""

    def graphs(self) -> dict[str, Graph]:
        """What is exported, as `<name>.onnx`; "model" is always there, and has the network's own inputs
        unless what is served starts from something else, such as noise."""
        axes = {name: AXES[name] for name in self.input_names if name in AXES}
        return {"model": Graph(self, self.input_names, self.output_names, axes, lambda batch: [batch])}


class Trunk(nn.Module):
    """Inputs to features. `width`: length of the feature vector; `input_names`: names of forward's tensors."""

    width: int
    input_names: tuple[str, ...]

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Named blocks from the input to the head; every parameter is in exactly one."""
        raise NotImplementedError

    def measure(self, inputs: Callable[[], list[Tensor]]) -> None:
        """As a network's."""


class Headed(Network):
    """A trunk, dropout, and the head of a task that has one (`models.heads`)."""

    def __init__(self, spec: ModelSpec, trunk: Trunk, dropout: float) -> None:
        super().__init__()
        self.spec = spec
        task = complete(spec)
        if not isinstance(task, HEADED):
            raise ValueError(f"{spec.architecture} has no way to do the task {tag(task)}")
        self.task = task
        self.trunk = trunk
        self.dropout = nn.Dropout(dropout)
        self.head = heads.head(self.task, trunk.width)
        self.input_names = trunk.input_names
        self.output_names = (*heads.output_names(self.task), "embedding")

    @property
    def width(self) -> int:
        return self.trunk.width

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return self.trunk.blocks()

    def measure(self, inputs: Callable[[], list[Tensor]], targets: Tensor) -> None:
        self.trunk.measure(inputs)
        heads.measure(self.head, self.task, targets)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """`inputs` in the order of `input_names` → `embedding` float32 [batch, width] and the head's outputs, such as
        `logits` float32 [batch, classes]."""
        embedding = self.trunk(*inputs)
        if self.head is None:
            return {"embedding": embedding}
        return {**heads.answer(self.head, self.dropout(embedding)), "embedding": embedding}


def complete(spec: ModelSpec) -> Task:
    """The task of a spec. Raises ValueError when it is still open."""
    if spec.task is None:
        raise ValueError(f"{spec.architecture}: the task is open; a network is built for a complete ModelSpec")
    return spec.task


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
