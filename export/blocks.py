"""A matrix as whole numbers of 8 or 4 bits, each block of BLOCK along its input with a scale and a zero of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32


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
    scales, zeros = steps(pieces, bits)
    values = np.clip(np.round(pieces / divisors(scales)[:, :, None]) + zeros[:, :, None], 0, most).astype(np.uint8)
    return Blocks(packed(values, bits), scales, packed(zeros.astype(np.uint8), bits))


def steps(pieces: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The scale and the zero of each piece [..., numbers], which is a whole number: 0 and all of its numbers are
    within reach."""
    least = np.minimum(pieces.min(axis=-1), np.float32(0.0))
    scales = (np.maximum(pieces.max(axis=-1), np.float32(0.0)) - least) / np.float32(2**bits - 1)
    return scales, np.round(-least / divisors(scales))


def divisors(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """What to divide by: a piece of zeros has no scale."""
    return np.where(scales == 0, np.float32(1.0), scales)


def numbers(kept: Blocks, width: int, bits: int) -> NDArray[np.float32]:
    """The matrix [out, width] that `blocks` stands for."""
    values = _unpacked(kept.values, bits).astype(np.float32)
    zeros = _unpacked(kept.zeros, bits)[:, : kept.scales.shape[1], None]
    found: NDArray[np.float32] = ((values - zeros) * kept.scales[:, :, None]).reshape(len(values), -1)[:, :width]
    return found


def packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """4-bit numbers along the last axis, two in a byte."""
    if bits == 8:
        return values
    even: NDArray[np.uint8] = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)])
    return even[..., ::2] | (even[..., 1::2] << np.uint8(4))


def _unpacked(kept: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return kept
    return np.stack((kept & 15, kept >> 4), axis=-1).reshape(*kept.shape[:-1], -1)
