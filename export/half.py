"""A language model's graph in half precision: what a GPU's attention takes, in half the memory.

Weights, states, keys and values become float16; lengths and tokens stay whole numbers, and the logits come out as
float32. Norms add up in float32 inside their operators.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.tensors_beside import DATA, values_of, written

LOGITS = "logits"
# The largest finite number of float16.
LARGEST = float(np.finfo(np.float16).max)


def halve(path: Path) -> None:
    """Put the graph at `path` into float16, in place. The old files stay whole until the new ones are.

    Raises ValueError naming the weight that is too large for it.
    """
    model = onnx.load(path, load_external_data=False)
    graph, data = model.graph, path.with_name(path.name + DATA)
    fresh = path.with_name(path.name + ".halving")
    with fresh.open("wb") as stream:
        for tensor in graph.initializer:
            if tensor.data_type != TensorProto.FLOAT:
                continue
            half = _half(values_of(tensor, data), tensor.name)
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.CopyFrom(written(stream, data.name, tensor.name, half))
            else:
                tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for tensor in (*graph.input, *graph.output):
        if tensor.type.tensor_type.elem_type == TensorProto.FLOAT and tensor.name != LOGITS:
            tensor.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in graph.node:
        for i, name in enumerate(node.output):
            if name == LOGITS:
                node.output[i] = f"half_{LOGITS}"
    graph.node.append(
        helper.make_node("Cast", [f"half_{LOGITS}"], [LOGITS], name=f"whole_{LOGITS}", to=TensorProto.FLOAT)
    )
    onnx.save_model(model, path)
    fresh.replace(data)


def _half(values: NDArray[Any], name: str) -> NDArray[np.float16]:
    if (largest := float(np.abs(values).max(initial=0.0))) > LARGEST:
        raise ValueError(f"float16 ends at {LARGEST:,.0f}, and {name} has {largest:,.0f}; keep float32, or take int8")
    return np.ascontiguousarray(values, np.float16)
