"""How much a published network computes for one item: multiplications that are added up, counted in its ONNX graphs.

Every operator that multiplies matrices is counted by the shapes that ONNX Runtime really saw: convolutions (one
product for each weight at each place), matrix products and einsums (so linear layers, and attention's two products),
and recurrent cells (all of their weights at each step). Additions alone, norms, activations and look-ups are not.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from export.bundle import GraphSpec, Manifest, TensorSpec

Shape = tuple[int, ...]
# Of a dynamic dimension by its name: one item, and nothing written yet; the others have the length of the item.
DIMENSIONS = {"batch": 1, "steps": 0}


def multiply_adds(folder: Path, manifest: Manifest, length: int) -> dict[str, int]:
    """Of each graph of a bundle, for one item of `length` steps or tokens."""
    graphs = {"model": GraphSpec(inputs=manifest.inputs, outputs=manifest.outputs), **manifest.graphs}
    return {name: count(folder / f"{name}.onnx", feeds(graph.inputs, length)) for name, graph in graphs.items()}


def feeds(inputs: Iterable[TensorSpec], length: int) -> dict[str, np.ndarray]:
    """Ones in the shapes that a graph takes: what is computed does not depend on the numbers."""
    return {
        one.name: np.ones(
            [size if isinstance(size, int) else DIMENSIONS.get(size, length) for size in one.shape], one.dtype
        )
        for one in inputs
    }


def count(path: Path, inputs: dict[str, np.ndarray]) -> int:
    """Multiply-adds of one run of a graph on `inputs`."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), data_prop=True)
    if model.functions or any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute):
        raise ValueError(f"{path}: has functions or loops, which are not counted")
    counted = [node for node in model.graph.node if node.op_type in COUNTS]
    given = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    wanted = {name for node in counted for name in (*node.input, *node.output) if name} - given.keys()
    shapes = {**given, **measured(model, wanted, inputs)}
    return sum(COUNTS[node.op_type](node, shapes) for node in counted)


def measured(model: onnx.ModelProto, names: set[str], inputs: dict[str, np.ndarray]) -> dict[str, Shape]:
    """The shapes of values inside a graph, as a run of it has them."""
    found = {name: value.shape for name, value in inputs.items() if name in names}
    types = {value.name: value.type for value in (*model.graph.value_info, *model.graph.output)}
    outputs = {output.name for output in model.graph.output}
    hidden = sorted(names - found.keys())
    for name in hidden:
        if name not in outputs:
            kind = types[name].tensor_type.elem_type if name in types else onnx.TensorProto.FLOAT
            model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    options = onnxruntime.SessionOptions()
    # As the graph was written: a fused operator would hide what is counted.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, str(path))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return found | {name: value.shape for name, value in zip(hidden, session.run(hidden, inputs), strict=True)}


Count = Callable[[onnx.NodeProto, dict[str, Shape]], int]


def convolution(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    """Weights [outputs, inputs / groups, ...]: each of an output channel at each place of the output."""
    weight = shapes[node.input[1]]
    return math.prod(shapes[node.output[0]]) * math.prod(weight[1:])


def transposed_convolution(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    """Weights [inputs, outputs / groups, ...]: each of an input channel at each place of the input."""
    weight = shapes[node.input[1]]
    return math.prod(shapes[node.input[0]]) * math.prod(weight[1:])


def product(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def affine(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


def recurrent(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    """x [length, batch, ...], w and r [directions, gates * width, ...]: every weight of both at every step."""
    length, batch = shapes[node.input[0]][:2]
    return length * batch * (math.prod(shapes[node.input[1]]) + math.prod(shapes[node.input[2]]))


def einsum(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    """As many products as the indices have combinations."""
    equation = next(attribute.s for attribute in node.attribute if attribute.name == "equation").decode()
    operands = equation.replace(" ", "").partition("->")[0].split(",")
    if "." in equation or len(operands) < 2:
        raise ValueError(f"{node.name}: the einsum {equation!r} is not counted")
    sizes: dict[str, int] = {}
    for indices, name in zip(operands, node.input, strict=True):
        sizes.update(zip(indices, shapes[name], strict=True))
    return math.prod(sizes.values())


COUNTS: dict[str, Count] = {
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "MatMul": product,
    "Gemm": affine,
    "RNN": recurrent,
    "LSTM": recurrent,
    "GRU": recurrent,
    "Einsum": einsum,
}
