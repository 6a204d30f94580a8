"""The matrices of a language model's graph in 8 or 4 bits: a quarter of the bytes that every token has to read.

ONNX Runtime's MatMulNBits multiplies by blocks of whole numbers. In 8 bits they are rounded to the nearest, in 4 so
that the columns of a matrix make up for each other on some texts (`export.rounding`). The table of tokens, the matrix
that answers, and those of queries, keys and values have 8 bits always: for their size, they are what rounding harms
most. Where table and answer are one, it is kept once. What is lost is measured on texts that were held out, and where
that is too much nothing is kept. Half precision (`export.half`) is judged the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.blocks import BLOCK, Blocks, blocks
from export.decoder import FUSED
from export.half import halve
from export.perplexity import Judged, judge
from export.rounding import Moments, moments, rounded
from export.tensors_beside import DATA, values_of, written

# States are rounded to 8 bits as they are multiplied: as floats they are eight times slower, and no better.
ACCURACY = 4
FINE_BITS = 8
# How the products are called that become queries, keys and values.
FINE = "qkv"
# Smaller matrices gain nothing.
SMALLEST = 2**10
# Of memory, for the moments of states; the texts are read once for as many matrices as there is room for.
MOMENT_BYTES = 2**29
TOLD_SECONDS = 5.0
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Quantization:
    """weights: of what kind the matrices become. most_loss: the share that the perplexity on `held_out`, the tokens of
    texts that nothing was learned from, may rise by. usual: the tokens of other texts, which 4 bits are rounded for."""

    weights: Literal["float16", "int8", "int4"]
    most_loss: float
    held_out: Sequence[NDArray[np.int64]]
    usual: Sequence[NDArray[np.int64]]


class TooMuchLost(ValueError):
    """The quantized model predicts too much worse; the message says by how much and what to do."""


def quantize_judged(path: Path, wanted: Quantization, progress: Callable[[str], None]) -> dict[str, float]:
    """Quantize the graph at `path` in place; perplexity, tokens a second and bytes before and after, by name.

    Raises TooMuchLost, and ValueError when there are no texts to judge it on.
    """
    if not wanted.held_out:
        raise ValueError(f"{wanted.weights}: there are no held-out texts of two tokens or more to judge it on")
    before = judge(path, wanted.held_out, _now_and_then(progress, "judging float32", "tokens"))
    if wanted.weights == "float16":
        halve(path)
    else:
        usual = wanted.usual if wanted.weights == "int4" else []
        quantize(path, BITS[wanted.weights], usual, _now_and_then(progress, f"to {wanted.weights}", "matrices"))
    after = judge(path, wanted.held_out, _now_and_then(progress, f"judging {wanted.weights}", "tokens"))
    rise = after.perplexity / before.perplexity - 1.0
    words = (
        f"perplexity on {before.tokens:,} held-out tokens is {after.perplexity:.4g} in {wanted.weights} and "
        f"{before.perplexity:.4g} in float32, {100 * rise:+.2f} in 100"
    )
    if not rise <= wanted.most_loss:  # also true of NaN
        raise TooMuchLost(
            f"{wanted.weights}: {words}; {100 * wanted.most_loss:g} are allowed. Nothing is published: "
            f"{'' if wanted.weights == 'int8' else 'take int8, or '}allow more (most_loss), or keep float32"
        )
    progress(f"{words}; {after.bytes / 2**20:,.1f} in place of {before.bytes / 2**20:,.1f} MiB")
    return {**_figures("float32", before), **_figures(wanted.weights, after), "held_out_tokens": float(before.tokens)}


def _figures(weights: str, judged: Judged) -> dict[str, float]:
    return {
        f"{weights}_perplexity": judged.perplexity,
        f"{weights}_tokens_per_second": judged.tokens_per_second,
        f"{weights}_bytes": float(judged.bytes),
    }


def _now_and_then(tell: Callable[[str], None], words: str, what: str) -> Callable[[int, int], None]:
    """Tells how much is done, every few seconds."""
    told = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TOLD_SECONDS:
            tell(f"{words}: {done:,} of {of:,} {what}")
            told = time.monotonic()

    return progress


def quantize(
    path: Path,
    bits: int,
    usual: Sequence[NDArray[np.int64]] = (),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Put the matrices of the graph at `path` into `bits` bits, 8 or 4, in place. usual: tokens of texts that they are
    rounded for; to the nearest number where there are none. progress: matrices done, and all.

    The weights are read and written one by one. The old files stay whole until the new ones are.
    """
    model = onnx.load(path, load_external_data=False)
    fresh = path.with_name(path.name + ".quantizing")
    with fresh.open("wb") as stream:
        _Rewriting(model, path, stream, bits, usual, progress).rewrite()
    onnx.save_model(model, path)
    fresh.replace(path.with_name(path.name + DATA))


class _Rewriting:
    """A graph whose nodes are replaced one by one, and the file that its weights go to."""

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        stream: BinaryIO,
        bits: int,
        usual: Sequence[NDArray[np.int64]],
        progress: Callable[[int, int], None],
    ) -> None:
        self.graph, self.path, self.stream, self.bits = model.graph, path, stream, bits
        self.usual, self.progress = usual, progress
        self.data = path.with_name(path.name + DATA)
        self.before = {one.name: one for one in model.graph.initializer}
        self.after: dict[str, TensorProto] = {}

    def rewrite(self) -> None:
        nodes = list(self.graph.node)
        products = [node for node in nodes if node.op_type == "MatMul" and self._large(node.input[1])]
        answer = next((node for node in products if node.output[0] == "logits"), None)
        replaced: dict[str, list[onnx.NodeProto]] = {}
        fine = [node for node in products if node is answer or node.name.startswith(FINE)]
        for group in self._groups([node for node in products if node not in fine]):
            found: Moments = {}
            if self.usual:
                states = list(dict.fromkeys(node.input[0] for node in group))
                found = moments(self.path, states, self.usual, lambda: self.progress(len(replaced), len(products)))
            for node in group:
                self.progress(len(replaced), len(products))
                replaced[node.name] = self._product(node, self.bits, found)
        for node in fine:
            self.progress(len(replaced), len(products))
            replaced[node.name] = self._product(node, FINE_BITS, {})
        self.progress(len(products), len(products))
        for node in nodes:
            if node.op_type == "Gather" and node.input[1] == "token" and self._large(node.input[0]):
                replaced[node.name] = self._lookup(node, answer)
        del self.graph.node[:]
        self.graph.node.extend(new for node in nodes for new in replaced.get(node.name, [node]))
        used = {name for node in self.graph.node for name in node.input}
        for name in self.before.keys() & used:
            self._keep(name, self._values(name))
        del self.graph.initializer[:]
        self.graph.initializer.extend(self.after.values())

    def _groups(self, products: list[onnx.NodeProto]) -> list[list[onnx.NodeProto]]:
        """So many at once that the moments of their states fit into the memory that is for them."""
        found: list[list[onnx.NodeProto]] = []
        room = 0
        for node in products:
            size = 4 * int(self.before[node.input[1]].dims[0]) ** 2
            if not found or room < size:
                found.append([])
                room = MOMENT_BYTES
            found[-1].append(node)
            room -= size
        return found

    def _product(self, node: onnx.NodeProto, bits: int, found: Moments) -> list[onnx.NodeProto]:
        states, weight = node.input
        width, out = self.before[weight].dims
        matrix = self._values(weight).T
        kept = rounded(matrix, found[states], bits) if states in found else blocks(matrix, bits)
        inputs = [states, *self._kept(weight, kept)]
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
            kept = self._kept(table, blocks(values, FINE_BITS))
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
                bits=FINE_BITS,
                block_size=BLOCK,
                gather_axis=0,
                quantize_axis=2,
            ),
            helper.make_node("Reshape", [looked_up, side_by_side], list(node.output), name=node.name),
        ]

    def _kept(self, weight: str, found: Blocks) -> list[str]:
        """The names of a matrix's values, scales and zeros, once they are written."""
        names = _names(weight)
        parts: tuple[NDArray[Any], ...] = (found.values, found.scales, found.zeros)
        for name, values in zip(names, parts, strict=True):
            self._keep(name, values)
        return names

    def _large(self, name: str) -> bool:
        tensor = self.before.get(name)
        return tensor is not None and len(tensor.dims) == 2 and int(np.prod(tensor.dims)) >= SMALLEST

    def _number(self, name: str, values: list[int]) -> str:
        self.after[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def _values(self, name: str) -> NDArray[Any]:
        """Of a constant of the graph before."""
        return values_of(self.before[name], self.data)

    def _keep(self, name: str, values: NDArray[Any]) -> None:
        """A constant of the new graph: large ones in the file."""
        if values.nbytes < SMALLEST:
            self.after[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        else:
            self.after[name] = written(self.stream, self.data.name, name, values)


def _names(weight: str) -> list[str]:
    return [f"{weight}.{part}" for part in ("values", "scales", "zeros")]


def _node(kind: str, inputs: list[str], stands_for: onnx.NodeProto, **attributes: Any) -> onnx.NodeProto:
    outputs = list(stands_for.output)
    return helper.make_node(kind, inputs, outputs, name=stands_for.name, domain=FUSED, **attributes)
