"""A trained network as an ONNX graph with a dynamic batch (and, for text, a dynamic length)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export.bundle import TensorSpec
from models.network import Network

UNITS = {
    "pixels": "intensity from 0 to 255, RGB, top row first",
    "input_ids": "token id",
    "attention_mask": "1 for a token, 0 for padding",
    "vector": "raw feature, standardized inside the graph",
    "logits": "unnormalized log-probability of each label",
    "embedding": "feature vector, not normalized",
}
# Dynamic dimensions of each input, after the batch.
DYNAMIC = {"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}


class _Tupled(nn.Module):
    """A Network whose outputs are a tuple, in a fixed order that the exporter can name."""

    def __init__(self, network: Network, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        answers = self.network(*inputs)
        return tuple(answers[name] for name in self.outputs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter prints, logs and warns of; its errors are raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def export_onnx(
    network: Network, path: Path, example: Mapping[str, np.ndarray]
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Write the graph of `network` in evaluation mode to `path`; what goes into it and what comes out.

    example: graph inputs by name, at least one row. The network is moved to the CPU. Whether the dynamic dimensions
    really are dynamic is for `export.parity` to find out: the exporter can freeze one without a word.
    """
    network.to("cpu").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    network.eval()
    outputs = ("logits", "embedding") if network.head is not None else ("embedding",)
    # A dimension of 1 would be taken for a constant, so the example has two rows at least.
    arguments = tuple(torch.from_numpy(np.concatenate([example[n]] * 2)[:3]) for n in network.input_names)
    names = {"batch": torch.export.Dim("batch"), "sequence": torch.export.Dim("sequence")}
    shapes = tuple(
        {0: names["batch"], **{axis: names[name] for axis, name in DYNAMIC.get(n, {}).items()}}
        for n in network.input_names
    )
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Tupled(network, outputs),
            arguments,
            dynamo=True,
            input_names=list(network.input_names),
            output_names=list(outputs),
            dynamic_shapes={"inputs": shapes},
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    for node in program.model.graph:
        for value in node.outputs:
            # The exporter names values after operators, and "embedding" is one: names must be unique in a graph.
            if value.name in outputs and value not in program.model.graph.outputs:
                value.name = f"inner_{value.name}"
    program.save(path)
    onnx.checker.check_model(str(path))
    graph = onnx.load(str(path), load_external_data=False).graph
    return [_tensor(value) for value in graph.input], [_tensor(value) for value in graph.output]


def _tensor(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    shape: list[int | str] = [d.dim_param or d.dim_value for d in kind.shape.dim]
    return TensorSpec(name=value.name, dtype=dtype, shape=shape, unit=UNITS[value.name])
