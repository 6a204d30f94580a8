"""A small decoder as a slot graph with random weights: rotary embedding, grouped queries, two layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_slot_graph(
    path: Path,
    *,
    vocabulary: int = 61,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    depth: int = 16,
    seed: int = 0,
    half: bool = False,
) -> Path:
    """The graph of a language model's bundle, without a bundle. half: in float16, but for the logits."""
    dtype, element = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    random, width = np.random.default_rng(seed), heads * depth
    weights, nodes, past, present = [], [], [], []

    def weight(name: str, *shape: int) -> str:
        value = random.standard_normal(shape) / np.sqrt(shape[0])
        weights.append(numpy_helper.from_array(value.astype(dtype), name))
        return name

    def constant(name: str, value: object, dtype: type) -> str:
        weights.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def node(kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    angles = np.arange(4096)[:, None] / 10000 ** (np.arange(depth // 2) / (depth // 2))
    cos, sin = constant("cos", np.cos(angles), dtype), constant("sin", np.sin(angles), dtype)
    behind = node("Sub", ["length", constant("one", 1, np.int32)], ["behind"])
    weights.append(numpy_helper.from_array(random.standard_normal((vocabulary, width)).astype(dtype), "embedding"))
    x = node("Gather", ["embedding", "token"], ["x"])
    for i in range(layers):
        q, k, v = (
            node("MatMul", [x, weight(f"{part}{i}w", width, size * depth)], [f"{part}{i}"])
            for part, size in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        names = [f"past_keys{i}", f"past_values{i}"]
        past += names
        present += [f"next_{name}" for name in names]
        node(
            "GroupQueryAttention",
            [q, k, v, *names, behind, "longest", cos, sin],
            [f"attended{i}", *(f"next_{name}" for name in names)],
            "com.microsoft",
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=1,
        )
        out = node("MatMul", [f"attended{i}", weight(f"o{i}w", width, width)], [f"o{i}"])
        x = node("Add", [x, out], [f"x{i}"])
    flat = node("Reshape", [x, constant("shape", [-1, width], np.int64)], ["flat"])
    chosen = node("Gather", [flat, "asked"], ["chosen"])
    last = node("MatMul", [chosen, weight("head", width, vocabulary)], ["last"])
    node("Cast", [last], ["logits"], to=TensorProto.FLOAT)

    def states(names: list[str]) -> list[onnx.ValueInfoProto]:
        shape = ["batch", kv_heads, "slot", depth]
        return [helper.make_tensor_value_info(name, element, shape) for name in names]

    inputs = [
        helper.make_tensor_value_info("token", TensorProto.INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("length", TensorProto.INT32, ["batch"]),
        helper.make_tensor_value_info("longest", TensorProto.INT32, []),
        helper.make_tensor_value_info("asked", TensorProto.INT64, ["places"]),
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["places", vocabulary])
    graph = helper.make_graph(nodes, "slots", [*inputs, *states(past)], [logits, *states(present)], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path
