"""Constants of a graph whose values lie in a file beside it, each where it can be mapped into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

# Of that file, behind the graph's name.
DATA = ".data"
# Where a tensor may begin in it.
ALIGNMENT = 4096


def written(stream: BinaryIO, location: str, name: str, values: NDArray[Any]) -> TensorProto:
    """A constant whose values are written to the end of `stream`, the file `location` beside the graph."""
    stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=values.shape, data_location=TensorProto.EXTERNAL)
    place = {"location": location, "offset": str(stream.tell()), "length": str(values.nbytes)}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    stream.write(np.ascontiguousarray(values).data)
    return tensor


def values_of(tensor: TensorProto, data: Path) -> NDArray[Any]:
    """Of a constant: mapped from the file `data`, where they lie in it."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return np.asarray(numpy_helper.to_array(tensor))
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(data, dtype, "r", int(place["offset"]), tuple(tensor.dims))
