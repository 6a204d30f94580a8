"""A decoder-only language model as an ONNX graph over slots: rows of keys and values that a step reads and extends in
place.

It is written operator by operator, not traced. A norm takes the sum it is behind with it; queries, keys and values are
one matrix product, and so are gate and widening; attention and rotation are ONNX Runtime's GroupQueryAttention; only
the places that are asked go through the last layer's end; weights lie in the file as the kernels take them. The file of
weights is written tensor by tensor, so that no more than one is in memory twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from export.tensors_beside import DATA, written
from models.decoder_parts import DecoderParts, Layer, Linear, Norm

OPSET, IR_VERSION = 23, 11
FUSED = "com.microsoft"
# GroupQueryAttention takes heads of a multiple of so many numbers, more where it rotates; zeros fill them up.
MULTIPLE, ROTATED_MULTIPLE = 8, 16


def write_decoder(parts: DecoderParts, path: Path) -> None:
    """Write the graph to `path`, and its weights beside it, as `path` + ".data".

    Inputs: `token` int64 [batch, tokens]; `length` int32 [batch], tokens of each sequence, the new ones counted;
    `longest` int32 [], the largest of them; `asked` int64 [places], of which of the batch · tokens new ones, row by
    row, logits are wanted; `past_keys0`, `past_values0`, … float32 [batch, kv_heads, slot, depth].
    Outputs: `logits` float32 [places, vocabulary]; `next_past_keys0`, …, to be bound to the memory of the past.

    A call has one token for each of many sequences, or many for one sequence, or many for many that all begin, shorter
    ones padded behind their ends.
    """
    data = path.with_name(path.name + DATA)
    with data.open("wb") as stream, torch.no_grad():
        writing = Writing(parts, stream, data.name)
        writing.decoder()
    onnx.save_model(writing.model(), path)


class Writing:
    """A graph in the making: its nodes, its constants, and the file that holds their values."""

    def __init__(self, parts: DecoderParts, stream: BinaryIO, location: str) -> None:
        self.parts, self.stream, self.location = parts, stream, location
        multiple = MULTIPLE if parts.rotation is None else ROTATED_MULTIPLE
        self.depth = -(-parts.depth // multiple) * multiple
        self.past = [f"past_{what}{i}" for i in range(len(parts.layers)) for what in ("keys", "values")]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def model(self) -> onnx.ModelProto:
        """All that has been written."""
        cache = ("batch", self.parts.kv_heads, "slot", self.depth)
        inputs = [
            described("token", np.int64, "batch", "tokens"),
            described("length", np.int32, "batch"),
            described("longest", np.int32),
            described("asked", np.int64, "places"),
            *(described(name, np.float32, *cache) for name in self.past),
        ]
        outputs = [
            described("logits", np.float32, "places", len(self.parts.head)),
            *(described(f"next_{name}", np.float32, *cache) for name in self.past),
        ]
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, list(self.constants.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(FUSED, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def decoder(self) -> None:
        """Everything, from the tokens to the logits."""
        parts, last = self.parts, len(self.parts.layers) - 1
        behind = [*(layer.attention_norm for layer in parts.layers[1:]), parts.norm]
        total = self.embedded()
        normed = self.norm(total, parts.layers[0].attention_norm, "attention_norm0")
        self.node("Sub", ["length", self.number("one", 1, np.int32)], "last_place")
        for i, layer in enumerate(parts.layers):
            mixed = self.attention(normed, layer, i)
            if i == last:
                mixed, total = self.of_asked(mixed, "mixed"), self.of_asked(total, "total")
            added = self.product(mixed, [self.filled(layer.out.weight, 1)], f"out{i}")
            normed, total = self.norm_of_sum(added, total, layer.out.bias, layer.feed_norm, f"feed_norm{i}")
            added = self.feed(normed, layer, i)
            name = "norm" if i == last else f"attention_norm{i + 1}"
            normed, total = self.norm_of_sum(added, total, layer.narrow.bias, behind[i], name)
        self.product(normed, [parts.head], "head", answer="logits")

    def embedded(self) -> str:
        """Of the tokens: float32 [batch, tokens, width]."""
        tokens = self.node("Gather", [self.weight("token_table", self.parts.table), "token"], "embedded_tokens")
        if self.parts.places is None:
            return tokens
        table = self.weight("place_table", self.parts.places)
        return self.node("Add", [tokens, self.node("Gather", [table, self.places()], "embedded_places")], "embedded")

    def places(self) -> str:
        """Of the new tokens in their sequences, int64 [batch, tokens]; padding behind a beginning counts on."""
        zero, one = self.number("zero", 0), self.number("step", 1)
        tokens = self.node("Squeeze", [self.node("Shape", ["token"], "shape", start=1, end=2)], "tokens_of_each")
        length = self.node("Cast", ["length"], "whole_length", to=TensorProto.INT64)
        first = self.node("Max", [self.node("Sub", [length, tokens], "before"), zero], "first_place")
        column = self.node("Unsqueeze", [first, self.number("second_axis", [1])], "first_places")
        return self.node("Add", [column, self.node("Range", [zero, tokens, one], "steps")], "places")

    def of_asked(self, states: str, name: str) -> str:
        """[batch, tokens, numbers] → [places, numbers]."""
        numbers = self.parts.heads * self.depth if name == "mixed" else self.parts.table.shape[1]
        flat = self.node("Reshape", [states, self.number(f"flat_{name}", [-1, numbers])], f"{name}_in_rows")
        return self.node("Gather", [flat, "asked"], f"asked_{name}")

    def attention(self, normed: str, layer: Layer, i: int) -> str:
        """What each head finds, [batch, tokens, heads · depth]; keys and values go into the slots."""
        parts = self.parts
        three = [self.rows(layer.query), self.rows(layer.key), self.rows(layer.value)]
        biases = [part.bias for part in three if part.bias is not None]
        found = [self.product(normed, [part.weight for part in three], f"qkv{i}"), "", ""]
        if biases:
            found[0] = self.node("Add", [found[0], self.weight(f"qkv_bias{i}", torch.cat(biases))], f"qkv_biased{i}")
        if layer.query_norm is not None and layer.key_norm is not None:
            found = self.normed_heads(found[0], layer.query_norm, layer.key_norm, i)
        turning = []
        if parts.rotation is not None:
            more = (self.depth - parts.depth) // 2
            tables = zip(("cosines", "sines"), parts.rotation, strict=True)
            turning = [self.weight(name, functional.pad(table, (0, more))) for name, table in tables]
        keys, values = self.past[2 * i : 2 * i + 2]
        return self.node(
            "GroupQueryAttention",
            [*found, keys, values, "last_place", "longest", *turning],
            f"mixed{i}",
            f"next_{keys}",
            f"next_{values}",
            domain=FUSED,
            num_heads=parts.heads,
            kv_num_heads=parts.kv_heads,
            scale=float(layer.scale),
            do_rotary=int(parts.rotation is not None),
            local_window_size=layer.window or -1,
        )

    def normed_heads(self, found: str, query_norm: Norm, key_norm: Norm, i: int) -> list[str]:
        """Queries, keys and values one by one, each query and each key normed."""
        parts, depth = self.parts, self.depth
        groups = [parts.heads * depth, parts.kv_heads * depth, parts.kv_heads * depth]
        sizes = self.number("head_sizes", groups)
        names = [f"{what}{i}" for what in ("queries", "keys", "values")]
        self.node("Split", [found, sizes], *names, axis=-1)
        for place, norm in ((0, query_norm), (1, key_norm)):
            by_head = self.number("by_head", [0, 0, -1, depth])
            heads = self.node("Reshape", [names[place], by_head], f"{names[place]}_by_head")
            # The zeros that fill a head up count as numbers of it: the mean is that much smaller.
            share = parts.depth / depth
            weight = self.filled(norm.weight * share**0.5, 0)
            heads = self.norm(heads, Norm(weight, None, norm.epsilon * share), f"{names[place]}_norm")
            side_by_side = self.number("side_by_side", [0, 0, -1])
            names[place] = self.node("Reshape", [heads, side_by_side], f"{names[place]}_normed")
        return names

    def feed(self, normed: str, layer: Layer, i: int) -> str:
        """What the feed-forward network adds, its last bias left out."""
        gates = [] if layer.gate is None else [layer.gate]
        halves = [*gates, layer.widen]
        wide = self.product(normed, [part.weight for part in halves], f"widen{i}")
        if layer.widen.bias is not None:
            bias = torch.cat([part.bias for part in halves if part.bias is not None])
            wide = self.node("Add", [wide, self.weight(f"widen_bias{i}", bias)], f"widened{i}")
        if not gates:
            wide = self.activation(wide, f"active{i}")
        else:
            self.node("Split", [wide], f"gate{i}", f"open{i}", axis=-1, num_outputs=2)
            wide = self.node("Mul", [self.activation(f"gate{i}", f"active{i}"), f"open{i}"], f"gated{i}")
        return self.product(wide, [layer.narrow.weight], f"narrow{i}")

    def activation(self, x: str, name: str) -> str:
        match self.parts.activation:
            case "silu":
                return self.node("QuickGelu", [x], name, domain=FUSED, alpha=1.0)
            case "gelu":
                return self.node("Gelu", [x], name)
            case "gelu_tanh":
                return self.node("Gelu", [x], name, approximate="tanh")
            case "relu":
                return self.node("Relu", [x], name)
            case other:
                raise ValueError(f"no operator for the activation {other!r}")

    def norm(self, x: str, norm: Norm, name: str) -> str:
        """Of the last axis."""
        weight = self.weight(f"{name}.weight", norm.weight)
        if norm.bias is None:
            return self.node("RMSNormalization", [x, weight], name, epsilon=norm.epsilon, axis=-1)
        bias = self.weight(f"{name}.bias", norm.bias)
        return self.node("LayerNormalization", [x, weight, bias], name, epsilon=norm.epsilon, axis=-1)

    def norm_of_sum(self, x: str, total: str, added: Tensor | None, norm: Norm, name: str) -> tuple[str, str]:
        """norm(x + added + total), and the sum."""
        inputs = [x, total, self.weight(f"{name}.weight", norm.weight)]
        kind = "SkipSimplifiedLayerNormalization"
        if norm.bias is not None:
            kind = "SkipLayerNormalization"
            inputs.append(self.weight(f"{name}.bias", norm.bias))
        if added is not None:
            inputs.append(self.weight(f"{name}.added", added))
        whole = f"{name}.sum"
        return self.node(kind, inputs, name, "", "", whole, domain=FUSED, epsilon=norm.epsilon), whole

    def product(self, x: str, weights: Sequence[Tensor], name: str, answer: str | None = None) -> str:
        """x times the weights [out, in], one behind the other along `out`."""
        weight = self.weight(f"{name}.weight", torch.cat(list(weights)).T if len(weights) > 1 else weights[0].T)
        return self.node("MatMul", [x, weight], answer or name)

    def rows(self, part: Linear) -> Linear:
        """A projection to heads, each filled up."""
        return Linear(self.filled(part.weight, 0), None if part.bias is None else self.filled(part.bias, 0))

    def filled(self, values: Tensor, axis: int) -> Tensor:
        """Numbers of heads, side by side along an axis, with zeros in between where the kernel wants deeper heads. It
        rotates pairs of a number of the first half and one of the second, so each half is filled up."""
        if self.depth == self.parts.depth:
            return values
        pieces = 1 if self.parts.rotation is None else 2
        before, after = self.parts.depth // pieces, self.depth // pieces
        values = values.movedim(axis, -1)
        values = values.reshape(*values.shape[:-1], -1, before)
        return functional.pad(values, (0, after - before)).flatten(-2).movedim(-1, axis)

    def node(self, kind: str, inputs: Sequence[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        """The name of its first output."""
        name = outputs[0]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))
        return name

    def number(self, name: str, value: int | list[int], dtype: type[np.integer[Any]] = np.int64) -> str:
        """One, or a few, in the graph itself."""
        self.constants[name] = numpy_helper.from_array(np.array(value, dtype), name)
        return name

    def weight(self, name: str, values: Tensor) -> str:
        """Weights, in the file beside the graph."""
        if name in self.constants:
            return name
        array = values.detach().to("cpu", torch.float32).contiguous().numpy()
        self.constants[name] = written(self.stream, self.location, name, array)
        return name


def described(name: str, dtype: type[np.generic], *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
