"""Numbers to the vectors that enter a graph; standardized there, with the training data's statistics."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from export.processing.inputs import BadInput, VectorInput


def vector(values: Sequence[float] | bytes, spec: VectorInput) -> np.ndarray:
    """Numbers, or little-endian float32 bytes, to float32 [features]. Raises BadInput on a wrong count or value."""
    if isinstance(values, bytes):
        if len(values) % 4:
            raise BadInput(
                f"a vector in binary is float32, 4 bytes a number; {len(values)} bytes are no whole number of them"
            )
        array = np.frombuffer(values, dtype="<f4")
    else:
        try:
            with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such below
                array = np.asarray(values, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadInput(f"a vector is a list of numbers: {error}") from error
    if array.shape != (spec.features,):
        raise BadInput(
            f"the vector has {array.size} numbers in shape {list(array.shape)}; this model takes {spec.features}"
        )
    finite = np.isfinite(array)
    if not finite.all():
        place = int(np.argmin(finite))
        raise BadInput(f"number {place} of the vector is {array[place]}; every number must be finite in float32")
    return array


def vectors(rows: Sequence[Sequence[float]] | bytes | memoryview, spec: VectorInput) -> np.ndarray:
    """Numbers, or little-endian float32 bytes of whole vectors one after the other, to float32 [rows, features], which
    may be a view on the bytes. Raises BadInput as `vector` does."""
    if isinstance(rows, bytes | memoryview):
        flat = np.frombuffer(rows, "<f4")
        if not flat.flags.aligned:
            flat = flat.copy()
    else:
        pack = packer(spec.features).pack
        try:
            flat = np.frombuffer(
                pack(*rows[0]) if len(rows) == 1 else b"".join([pack(*row) for row in rows]), np.float32
            )
        except struct.error:  # a wrong count, or no numbers
            return np.stack([vector(row, spec) for row in rows])
    block: np.ndarray = flat.reshape(-1, spec.features)
    if not np.isfinite(flat).all():
        for row in block if isinstance(rows, bytes | memoryview) else rows:
            vector(row.tobytes() if isinstance(row, np.ndarray) else row, spec)
    return block


@lru_cache(64)
def packer(features: int) -> struct.Struct:
    """Makes so many Python numbers float32 in a third of the time that NumPy takes."""
    return struct.Struct(f"{features}f")
