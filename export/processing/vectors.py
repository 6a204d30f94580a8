"""Numbers to the vectors that enter a graph; standardized there, with the training data's statistics."""

from __future__ import annotations

from collections.abc import Sequence

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
