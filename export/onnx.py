"""A trained network as an ONNX graph with a dynamic batch (and, for text, a dynamic length)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export.bundle import GraphSpec, TensorSpec
from export.decoder import write_decoder
from models.decoder_parts import LanguageNetwork
from models.network import Graph, Network

UNITS = {
    "pixels": "intensity from 0 to 255, RGB, top row first",
    "input_ids": "token id",
    "attention_mask": "1 for a token or step, 0 for padding",
    "token": "token id",
    "length": "tokens of the sequence, the new ones counted",
    "longest": "the largest length",
    "asked": "number of a new token, counted row by row",
    "attention": "share of each token of the source, the sum is 1",
    "vector": "raw feature, standardized inside the graph",
    "series": "raw number, standardized inside the graph",
    "logits": "unnormalized log-probability of each label",
    "value": "in the data's units",
    "deviation": "one standard deviation, in the data's units",
    "uncertainty": "how far the members are apart: mutual information in nats, or a deviation in the data's units",
    "reconstruction": "in the input's units",
    "error": "mean squared error of the reconstruction",
    "latent": "standard normal",
    "image": "intensity from 0 to 255, RGB, top row first",
    "embedding": "feature vector, not normalized",
}


class _Tupled(nn.Module):
    """A graph whose outputs are a tuple, in a fixed order that the exporter can name."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.module = graph.module
        self.outputs = graph.outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        answers = self.module(*inputs)
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


def export_onnx(network: Network, folder: Path, example: Mapping[str, np.ndarray]) -> dict[str, GraphSpec]:
    """Write the graphs of `network` in evaluation mode into `folder`, each as `<name>.onnx`; what they take and give.

    example: the network's inputs by name, at least one row. The network is moved to the CPU. Whether the dynamic
    dimensions really are dynamic is for `export.parity` to find out: the exporter can freeze one without a word.
    """
    network.to("cpu").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    network.eval()
    if isinstance(network, LanguageNetwork):
        write_decoder(network.parts(), folder / "model.onnx")
        return {"model": _described(folder / "model.onnx")}
    # A dimension of 1 would be taken for a constant, so the example has two rows at least.
    batch = {name: torch.from_numpy(np.concatenate([example[name]] * 2)[:3]) for name in network.input_names}
    found = {}
    for name, graph in network.graphs().items():
        with torch.no_grad():
            inputs = graph.examples(batch)[0]
        found[name] = _write(graph, folder / f"{name}.onnx", inputs)
    return found


def _write(graph: Graph, path: Path, example: Mapping[str, Tensor]) -> GraphSpec:
    dimensions: dict[str, Any] = {}
    shapes = tuple(
        {
            axis: dimensions.setdefault(dimension, torch.export.Dim(dimension))
            for axis, dimension in {0: "batch", **graph.axes.get(name, {})}.items()
        }
        for name in graph.inputs
    )
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Tupled(graph),
            tuple(example[name] for name in graph.inputs),
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes={"inputs": shapes},
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    for node in program.model.graph:
        for value in node.outputs:
            # The exporter names values after operators, and "embedding" is one: names must be unique in a graph.
            if value.name in graph.outputs and value not in program.model.graph.outputs:
                value.name = f"inner_{value.name}"
    program.save(path)
    return _described(path)


def _described(path: Path) -> GraphSpec:
    """What a written graph takes and gives. Raises what the checker raises for one that is none."""
    onnx.checker.check_model(str(path))
    written = onnx.load(str(path), load_external_data=False).graph
    return GraphSpec(
        inputs=[_tensor(value) for value in written.input], outputs=[_tensor(value) for value in written.output]
    )


def _tensor(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    shape: list[int | str] = [d.dim_param or d.dim_value for d in kind.shape.dim]
    return TensorSpec(name=value.name, dtype=dtype, shape=shape, unit=_unit(value.name))


def _unit(name: str) -> str:
    """Of a tensor by its name, which may end in that of one of several heads."""
    return UNITS.get(name) or UNITS.get(name.partition("_")[0], "state of the network")
