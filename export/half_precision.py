"""Any graph in half precision: float16, or bfloat16 with the range of float32 and eight binary digits (Kalamkar et al.
2019). What goes in and comes out stays float32; in between every tensor of numbers is half as large.

float16 ends at 65,504: a graph whose tensors grow larger on the data it is made for is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.graph_session import opened
from export.half import LARGEST

Half = Literal["float16", "bfloat16"]
TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# What is larger stands for nothing, in a mask.
NOTHING = 1e38
# Tensors that are looked at in one run: each is an output, and takes memory.
WATCHED = 64


def half(path: Path, target: Path, precision: Half) -> None:
    """Write the graph at `path`, whose weights are inside it, in half precision to `target`. Raises ValueError naming a
    weight that is too large, or an operator that ONNX does not know in this precision (a convolution of bfloat16)."""
    model, kind = onnx.load(path), TYPES[precision]
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(_converted(tensor, kind))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(_converted(attribute.t, kind))
            elif attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = kind
            elif attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                raise ValueError(f"{precision}: the graph has a {node.op_type}, whose inside is left as it is")
    casts = []
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            inside = f"{value.name}_half"
            _rename(graph.node, "input", value.name, inside)
            casts.append((0, helper.make_node("Cast", [value.name], [inside], name=f"cast_{value.name}", to=kind)))
    for value in graph.output:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            inside = f"{value.name}_half"
            _rename(graph.node, "input", value.name, inside)
            _rename(graph.node, "output", value.name, inside)
            cast = helper.make_node("Cast", [inside], [value.name], name=f"cast_{value.name}", to=TensorProto.FLOAT)
            casts.append((len(graph.node), cast))
    for place, node in casts:
        graph.node.insert(0 if place == 0 else len(graph.node), node)
    del graph.value_info[:]  # they say float32
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.shape_inference.InferenceError as error:
        why = str(error).removeprefix("[ShapeInferenceError] ").splitlines()[0]
        raise ValueError(f"{precision}: ONNX has no such operator: {why}") from error
    onnx.save_model(model, target)


def largest_values(path: Path, batches: Iterable[Mapping[str, np.ndarray]]) -> tuple[str, float]:
    """The tensor of the graph at `path` with the largest number in it on these batches, and that number."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    floats = [one.name for one in model.graph.value_info if one.type.tensor_type.elem_type == TensorProto.FLOAT]
    given = list(batches)
    found = ("nothing", 0.0)
    for start in range(0, len(floats), WATCHED):
        watched = floats[start : start + WATCHED]
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        known = {output.name for output in copy.graph.output}
        copy.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in watched if name not in known
        )
        session = opened(copy.SerializeToString())
        for inputs in given:
            for name, value in zip(watched, session.run(watched, dict(inputs)), strict=True):
                sizes = np.abs(value)
                if (size := float(sizes[sizes < NOTHING].max(initial=0.0))) > found[1]:
                    found = (name, size)
    return found


def _converted(tensor: TensorProto, kind: int) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    if kind == TensorProto.BFLOAT16:
        made = TensorProto(name=tensor.name, data_type=kind, dims=tensor.dims)
        made.raw_data = _rounded(values).tobytes()
        return made
    sizes = np.abs(values)
    if (largest := float(sizes[sizes < NOTHING].max(initial=0.0))) > LARGEST:
        raise ValueError(f"float16 ends at {LARGEST:,.0f}, and {tensor.name} has {largest:,.0f}")
    # What stands for "nothing" in a mask, the lowest float32, becomes the lowest float16.
    return numpy_helper.from_array(np.clip(values, -LARGEST, LARGEST).astype(np.float16), tensor.name)


def _rounded(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even: its 16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _rename(nodes: Iterable[onnx.NodeProto], side: str, old: str, new: str) -> None:
    for node in nodes:
        names = getattr(node, side)
        for i, name in enumerate(names):
            if name == old:
                names[i] = new
