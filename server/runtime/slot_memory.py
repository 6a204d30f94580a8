"""The memory of keys and values: for every layer buffers [slots, kv_heads, context, head_dim], where the session runs.

A row of a buffer is one slot. Graphs are given rows by pointer, and write where they read.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnxruntime

# kv_heads, context, head_dim
RowShape = tuple[int, int, int]


class SlotMemory(Protocol):
    """device: as ONNX Runtime calls it. pointers: of the buffers, in the order of their shapes."""

    device: str
    pointers: list[int]

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` places of row `target` those of row `source`."""

    def release(self, row: int, kept: int) -> None:
        """Places of a row from `kept` on are needed no longer: their memory may go back to the system."""


class HostMemory:
    """Memory that is taken when it is first written to, page by page, and given back."""

    device = "cpu"

    def __init__(self, slots: int, shapes: Sequence[RowShape], dtype: np.dtype) -> None:
        self.maps, self.buffers = [], []
        for shape in shapes:
            size = slots * int(np.prod(shape)) * dtype.itemsize
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_NOHUGEPAGE"):  # one of 2 MiB would be taken for a few tokens of each head
                memory.madvise(mmap.MADV_NOHUGEPAGE)
            self.maps.append(memory)
            self.buffers.append(np.frombuffer(memory, dtype).reshape(slots, *shape))
        self.pointers = [buffer.ctypes.data for buffer in self.buffers]

    def copy(self, source: int, target: int, length: int) -> None:
        for buffer in self.buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def release(self, row: int, kept: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for memory, buffer in zip(self.maps, self.buffers, strict=True):
            heads = buffer.shape[1] if kept else 1
            size = buffer.strides[0] // heads
            for head in range(heads):
                first = row * buffer.strides[0] + head * size
                begin = -(-(first + kept * buffer.strides[2]) // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (first + size) // mmap.PAGESIZE * mmap.PAGESIZE
                if begin < end:
                    memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class DeviceMemory:
    """Memory of a GPU, all of it taken at once. Rows are copied whole: that takes the device no longer than it takes to
    ask it for a part."""

    def __init__(self, slots: int, shapes: Sequence[RowShape], dtype: np.dtype, provider: str, device: str) -> None:
        self.device, self.dtype = device, dtype
        self.values = [
            onnxruntime.OrtValue.ortvalue_from_shape_and_type([slots, *shape], dtype, device, 0) for shape in shapes
        ]
        self.pointers = [value.data_ptr() for value in self.values]
        self.sizes = [int(np.prod(shape)) for shape in shapes]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        element = {np.dtype(np.float32): 1, np.dtype(np.float16): 10}[dtype]
        self.session = onnxruntime.InferenceSession(identity(element), options, providers=[provider])
        self.binding = self.session.io_binding()

    def copy(self, source: int, target: int, length: int) -> None:
        for pointer, size in zip(self.pointers, self.sizes, strict=True):
            row = size * self.dtype.itemsize
            self.binding.bind_input("x", self.device, 0, self.dtype, (size,), pointer + source * row)
            self.binding.bind_output("y", self.device, 0, self.dtype, (size,), pointer + target * row)
            self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()

    def release(self, row: int, kept: int) -> None:
        """It stays taken."""


def identity(element: int) -> bytes:
    """An ONNX model that copies x [size] to y, written out: the server has no ONNX library. element: of TensorProto."""

    def field(number: int, value: int | bytes) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        return bytes([number << 3 | 2, len(value)]) + value

    def tensor(name: bytes) -> bytes:
        shape = field(1, field(2, b"size"))
        return field(1, name) + field(2, field(1, field(1, element) + field(2, shape)))

    node = field(1, b"x") + field(2, b"y") + field(4, b"Identity")
    graph = field(1, node) + field(2, b"copy") + field(11, tensor(b"x")) + field(12, tensor(b"y"))
    return field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 17))
