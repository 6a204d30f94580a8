"""The matrices of a language model's graph in 8 or 4 bits: a quarter of the bytes that every token has to read.

Each block of BLOCK numbers along a matrix's input is kept as small whole numbers with a scale and a zero of its own, by
rounding to the nearest; ONNX Runtime's MatMulNBits multiplies by them, the states in 8 bits, too (accuracy level 4).
The table of tokens and the matrix that answers have 8 bits always: they are what rounding harms most. Where both are
one table, it is kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.decoder import ALIGNMENT, DATA, FUSED

# Of the choices 32, 64 and 128, with and without a zero of its own, with states in 8 bits or as floats, this loses
# least for its speed: measured by perplexity and tokens a second of SmolLM2-135M on AVX-512.
BLOCK = 32
ACCURACY = 4
TABLE_BITS = 8
# Smaller matrices gain nothing.
SMALLEST = 2**10


@dataclass(frozen=True)
class Blocks:
    """A matrix [out, in] in pieces: values uint8 [out, blocks, BLOCK · bits / 8], 4-bit numbers two in a byte, the
    first in its lower half; scales float32 [out, blocks]; zeros uint8 [out, blocks · bits / 8, rounded up]."""

    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]


def blocks(matrix: NDArray[np.float32], bits: int) -> Blocks:
    """matrix: [out, in], filled up with zeros to whole blocks. A number is (value - zero) · scale."""
    count, most = -(-matrix.shape[1] // BLOCK), 2**bits - 1
    whole = np.zeros((len(matrix), count * BLOCK), np.float32)
    whole[:, : matrix.shape[1]] = matrix
    pieces = whole.reshape(len(matrix), count, BLOCK)
    least = np.minimum(pieces.min(axis=2, keepdims=True), 0.0)
    scales = (np.maximum(pieces.max(axis=2, keepdims=True), 0.0) - least) / np.float32(most)
    safe = np.where(scales == 0, 1, scales)
    zeros = np.round(-least / safe)
    values = np.clip(np.round(pieces / safe) + zeros, 0, most).astype(np.uint8)
    return Blocks(_packed(values, bits), scales[:, :, 0].astype(np.float32), _packed(zeros[:, :, 0].astype(np.uint8), bits))


def numbers(kept: Blocks, width: int, bits: int) -> NDArray[np.float32]:
    """The matrix [out, width] that `blocks` stands for."""
    values = _unpacked(kept.values, bits).astype(np.float32)
    zeros = _unpacked(kept.zeros, bits)[:, : kept.scales.shape[1], None]
    found: NDArray[np.float32] = ((values - zeros) * kept.scales[:, :, None]).reshape(len(values), -1)[:, :width]
    return found


def quantize(path: Path, bits: int, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
    """Put the matrices of the graph at `path` into `bits` bits, 8 or 4, in place. progress: matrices done, and all.

    The weights are read and written one by one. The old files stay whole until the new ones are.
    """
    model = onnx.load(path, load_external_data=False)
    data, fresh = path.with_name(path.name + DATA), path.with_name(path.name + ".quantizing")
    with fresh.open("wb") as stream:
        _Rewriting(model, data, stream, bits, progress).rewrite()
    onnx.save_model(model, path)
    fresh.replace(data)


class _Rewriting:
    """A graph whose nodes are replaced one by one, and the file that its weights go to."""

    def __init__(
        self, model: onnx.ModelProto, data: Path, stream: BinaryIO, bits: int, progress: Callable[[int, int], None]
    ) -> None:
        self.graph, self.data, self.stream, self.bits, self.progress = model.graph, data, stream, bits, progress
        self.before = {one.name: one for one in model.graph.initializer}
        self.after: dict[str, TensorProto] = {}

    def rewrite(self) -> None:
        nodes = list(self.graph.node)
        products = [node for node in nodes if node.op_type == "MatMul" and self._large(node.input[1])]
        answer = next((node for node in products if node.output[0] == "logits"), None)
        replaced: dict[str, list[onnx.NodeProto]] = {}
        for done, node in enumerate(products):
            self.progress(done, len(products))
            replaced[node.name] = self._product(node, TABLE_BITS if node is answer else self.bits)
        self.progress(len(products), len(products))
        for node in nodes:
            if node.op_type == "Gather" and self._large(node.input[0]):
                replaced[node.name] = self._lookup(node, answer)
        del self.graph.node[:]
        self.graph.node.extend(new for node in nodes for new in replaced.get(node.name, [node]))
        used = {name for node in self.graph.node for name in node.input}
        for name in self.before.keys() & used:
            self._keep(name, self._values(name))
        del self.graph.initializer[:]
        self.graph.initializer.extend(self.after.values())

    def _product(self, node: onnx.NodeProto, bits: int) -> list[onnx.NodeProto]:
        states, weight = node.input
        width, out = self.before[weight].dims
        inputs = [states, *self._blocks(weight, self._values(weight).T, bits)]
        return [
            _node("MatMulNBits", inputs, node, K=width, N=out, bits=bits, block_size=BLOCK, accuracy_level=ACCURACY)
        ]

    def _lookup(self, node: onnx.NodeProto, answer: onnx.NodeProto | None) -> list[onnx.NodeProto]:
        """Rows of a table, of the answer's where that is the same one."""
        table, tokens = node.input
        width = self.before[table].dims[1]
        if width % BLOCK:
            return [node]
        values = self._values(table)
        if answer is not None and np.array_equal(values, self._values(answer.input[1]).T):
            kept = _names(answer.input[1])
        else:
            kept = self._blocks(table, values, TABLE_BITS)
        # One dimension more: the blocks of a row, which then are put side by side.
        column, side_by_side = self._number("column", [0, 0, 1]), self._number("blocks_side_by_side", [0, 0, width])
        flat = [f"{name}.column" for name in kept[1:]]
        looked_up = f"{node.output[0]}.blocks"
        return [
            helper.make_node("Reshape", [kept[1], column], [flat[0]], name=flat[0]),
            helper.make_node("Reshape", [kept[2], column], [flat[1]], name=flat[1]),
            helper.make_node(
                "GatherBlockQuantized",
                [kept[0], tokens, *flat],
                [looked_up],
                name=looked_up,
                domain=FUSED,
                bits=TABLE_BITS,
                block_size=BLOCK,
                gather_axis=0,
                quantize_axis=2,
            ),
            helper.make_node("Reshape", [looked_up, side_by_side], list(node.output), name=node.name),
        ]

    def _blocks(self, weight: str, matrix: NDArray[np.float32], bits: int) -> list[str]:
        """The names of a matrix's values, scales and zeros, once they are written."""
        found, names = blocks(matrix, bits), _names(weight)
        for name, values in zip(names, (found.values, found.scales, found.zeros), strict=True):
            self._keep(name, values)
        return names

    def _large(self, name: str) -> bool:
        tensor = self.before.get(name)
        return tensor is not None and len(tensor.dims) == 2 and int(np.prod(tensor.dims)) >= SMALLEST

    def _number(self, name: str, values: list[int]) -> str:
        self.after[name] = numpy_helper.from_array(np.int64(values), name)
        return name

    def _values(self, name: str) -> NDArray[Any]:
        """Of a constant of the graph before, mapped from its file."""
        tensor = self.before[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.memmap(self.data, dtype, "r", int(place["offset"]), tuple(tensor.dims))

    def _keep(self, name: str, values: NDArray[Any]) -> None:
        """A constant of the new graph: large ones in the file."""
        if values.nbytes < SMALLEST:
            self.after[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
            return
        self.stream.write(b"\0" * (-self.stream.tell() % ALIGNMENT))
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=values.shape, data_location=TensorProto.EXTERNAL)
        place = {"location": self.data.name, "offset": str(self.stream.tell()), "length": str(values.nbytes)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        self.stream.write(np.ascontiguousarray(values).data)
        self.after[name] = tensor


def _names(weight: str) -> list[str]:
    return [f"{weight}.{part}" for part in ("values", "scales", "zeros")]


def _node(kind: str, inputs: list[str], stands_for: onnx.NodeProto, **attributes: Any) -> onnx.NodeProto:
    outputs = list(stands_for.output)
    return helper.make_node(kind, inputs, outputs, name=stands_for.name, domain=FUSED, **attributes)


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """4-bit numbers along the last axis, two in a byte."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    found: NDArray[np.uint8] = values[..., ::2] | (values[..., 1::2] << 4)
    return found


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)
