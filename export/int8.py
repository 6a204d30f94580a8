"""A graph in whole numbers of 8 bits, by ONNX Runtime's own quantization (Jacob et al. 2018).

static: of convolutions and matrices, with the range of every tensor measured on data; inputs and weights are whole
numbers. dynamic: of matrices only, with the range of what goes into them measured in every run: for texts, whose
tensors have outliers. Weights take 7 of the bits: with 8, processors without VNNI would saturate, and answers would
depend on where a bundle is served.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

STATIC = ("Conv", "Gemm", "MatMul")


class Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.left = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.left, None)
        return None if batch is None else dict(batch)


def dynamic(path: Path, target: Path) -> None:
    """Write the graph at `path` with quantized matrices to `target`."""
    model = onnx.load(path)
    del model.graph.value_info[:]  # where the exporter wrote the shapes of its sample for any batch's
    with _quiet():
        quantize_dynamic(model, str(target), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)


def static(path: Path, target: Path, batches: Sequence[Mapping[str, np.ndarray]], *, ends: bool) -> None:
    """Write the graph at `path`, quantized for inputs like those in `batches`, to `target`. ends: its first and
    last layer, too, which are few of the multiplications, and where most is lost."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        layers = [node.name for node in onnx.load(prepared).graph.node if node.op_type in STATIC]
        quantize_static(
            str(prepared),
            str(target),
            Batches(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            op_types_to_quantize=list(STATIC),
            nodes_to_exclude=[] if ends else [layers[0], layers[-1]],
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """It recommends on the root logger what we have done."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
