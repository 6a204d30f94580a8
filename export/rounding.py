"""Rounding that makes up for itself: GPTQ (Frantar et al. 2023).

A matrix is rounded column by column, and what each column's rounding does to the answers on some texts is taken back by
the columns that are not rounded yet, as far as they can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from export.blocks import BLOCK, Blocks, divisors, packed, steps

# Added to the diagonal of the moments, as a share of its mean.
DAMPING = 0.01
# Tokens that are read at once.
PIECE = 128

Moments = dict[str, NDArray[np.float32]]


def moments(path: Path, names: Sequence[str], texts: Sequence[NDArray[np.int64]], told: Callable[[], None]) -> Moments:
    """Σ x xᵀ over the tokens of `texts`, float32 [width, width], of the states `names` of the graph at `path`, which
    are float32 [..., width]. told: called for every piece that is read."""
    model = onnx.load(path, load_external_data=False)
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    beside = path.with_name("rounding.onnx")
    onnx.save_model(model, beside)
    try:
        session = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"])
    finally:
        beside.unlink()
    empty = {
        value.name: np.zeros((1, value.shape[1], PIECE, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    found: Moments = {}
    for text in texts:
        for start in range(0, len(text), PIECE):
            told()
            token = text[None, start : start + PIECE]
            length = np.array(token.shape[1], np.int32)
            given = {"token": token, "length": length[None], "longest": length, "asked": np.arange(token.shape[1])}
            for name, states in zip(names, session.run(list(names), {**given, **empty}), strict=True):
                flat = states.reshape(-1, states.shape[-1])
                found[name] = found.get(name, np.float32(0.0)) + flat.T @ flat
    return found


def rounded(matrix: NDArray[np.float32], moment: NDArray[np.float32], bits: int) -> Blocks:
    """As `export.blocks.blocks` of a matrix [out, in], with what is lost on states of the `moment` [in, in] made up
    for."""
    width, count, most = matrix.shape[1], -(-matrix.shape[1] // BLOCK), 2**bits - 1
    left = np.zeros((len(matrix), count * BLOCK), np.float32)
    left[:, :width] = matrix
    factor = np.eye(count * BLOCK, dtype=np.float32)
    factor[:width, :width] = _factor(moment)
    values = np.zeros(left.shape, np.uint8)
    scales, zeros = (np.zeros((len(matrix), count), np.float32) for _ in range(2))
    for block in range(count):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        piece, missed = left[:, columns], np.zeros((len(matrix), BLOCK), np.float32)
        inner = factor[columns, columns]
        scale, zero = steps(piece, bits)
        divisor = divisors(scale)
        for column in range(BLOCK):
            value = np.clip(np.round(piece[:, column] / divisor) + zero, 0, most)
            values[:, columns.start + column] = value
            missed[:, column] = (piece[:, column] - (value - zero) * scale) / inner[column, column]
            piece[:, column:] -= np.outer(missed[:, column], inner[column, column:])
        left[:, columns.stop :] -= missed @ factor[columns, columns.stop :]
        scales[:, block], zeros[:, block] = scale, zero
    return Blocks(packed(values.reshape(len(matrix), count, BLOCK), bits), scales, packed(zeros.astype(np.uint8), bits))


def _factor(moment: NDArray[np.float32]) -> NDArray[np.float32]:
    """U of moment⁻¹ = Uᵀ U, upper triangular: its rows say how far each column after one can make up for it."""
    exact = moment.astype(np.float64)
    diagonal = np.diag(exact)
    exact += np.diag(np.where(diagonal == 0, 1.0, 0.0) + DAMPING * max(diagonal.mean(), 1e-12))
    found: NDArray[np.float32] = np.linalg.cholesky(np.linalg.inv(exact)).T.astype(np.float32)
    return found
