"""One ONNX Runtime session on a GPU with a stream and memory of its own: a batch goes in by one copy an input and comes
back by one copy an output, from and to page-locked memory, and nothing else crosses the bus.

The memory is kept and grows with the largest batch. Copies and kernels are put on the stream one behind the other, and
the thread waits once, at the end: lanes side by side copy while others compute.

A captured lane has ONNX Runtime record what a batch of one size puts on the stream, and replays it by one call. While
it records, no other thread of the process may ask CUDA for memory, so everybody else waits (`capturing`).
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnxruntime

from server.runtime.cuda_runtime import TO_DEVICE, TO_HOST

log = logging.getLogger("espalier.session")

# Of texts there may be as many shapes as there are lengths.
MOST_BINDINGS = 256
# Runs of one shape until ONNX Runtime has recorded it: two that prepare, one that records.
RECORDING_RUNS = 3
NOT_RECORDED = -1
TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}

# Of the inputs, and which outputs are wanted.
Shapes = tuple[Any, ...]


class DeviceRuntime(Protocol):
    """As `server.runtime.cuda_runtime.CudaRuntime` is."""

    def use(self, device: int) -> None: ...
    def stream(self) -> int: ...
    def synchronize(self, stream: int) -> None: ...
    def device_memory(self, size: int) -> int: ...
    def host_memory(self, size: int) -> int: ...
    def copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None: ...
    def free(self, device: int, host: int, stream: int) -> None: ...


@dataclass
class Buffer:
    """Memory of one tensor on both sides. size: bytes of each."""

    size: int = 0
    device: int = 0
    host: int = 0
    view: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))

    def array(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """The host's side, as so shaped an array."""
        count = int(np.prod(shape)) * dtype.itemsize
        return self.view[:count].view(dtype).reshape(shape)


class Gate:
    """Many may be inside at once, or one alone."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside = 0
        self.alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self.changed:
            while self.alone:
                self.changed.wait()
            self.inside += 1
        try:
            yield
        finally:
            with self.changed:
                self.inside -= 1
                self.changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self.changed:
            while self.alone:
                self.changed.wait()
            self.alone = True
            while self.inside:
                self.changed.wait()
        try:
            yield
        finally:
            with self.changed:
                self.alone = False
                self.changed.notify_all()


capturing = Gate()


class Lane:
    """For one thread at a time."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        runtime: DeviceRuntime,
        *,
        device_name: str,
        device: int,
        stream: int,
        size: int | None = None,
        captured: bool = False,
    ) -> None:
        """session: computes on `stream`. device_name: of its memory, as ONNX Runtime calls it. size: that every batch
        is filled up to. captured: it captures CUDA graphs, and is for one thread alone: ONNX Runtime keeps them for the
        thread that has recorded them."""
        self.session, self.runtime = session, runtime
        self.device_name, self.device, self.stream = device_name, device, stream
        self.size, self.captured = size, captured
        self.provider: str = session.get_providers()[0]
        self.inputs = {tensor.name: TYPES[tensor.type] for tensor in session.get_inputs()}
        self.buffers: dict[str, Buffer] = {}
        self.bindings: dict[Shapes, onnxruntime.IOBinding] = {}
        # Of every shape that is recorded: its number, and the runs so far.
        self.recorded: dict[Shapes, tuple[int, int]] = {}
        # Host to device and back, so far.
        self.copies = 0
        weakref.finalize(self, _release, runtime, self.buffers, stream)

    def run(self, inputs: Mapping[str, Sequence[np.ndarray]], outputs: Sequence[str]) -> list[np.ndarray]:
        """inputs: by name arrays [rows, …] that are put together along their first axis. The outputs of that batch."""
        rows = sum(len(part) for part in next(iter(inputs.values())))
        padded = max(rows, self.size or 0)
        shapes = {name: (padded, *parts[0].shape[1:]) for name, parts in inputs.items()}
        key = (*shapes.values(), *outputs)
        if not self.captured:
            with capturing.shared():
                return self._run(inputs, outputs, shapes, key, rows, NOT_RECORDED)
        number, runs = self.recorded.get(key, (len(self.recorded), 0))
        if number == NOT_RECORDED or runs >= RECORDING_RUNS:
            with capturing.shared():
                return self._run(inputs, outputs, shapes, key, rows, number)
        self.recorded[key] = number, runs + 1
        with capturing.exclusive():
            try:
                return self._run(inputs, outputs, shapes, key, rows, number)
            except Exception as error:  # ONNX Runtime's own classes, of a kernel that cannot be recorded
                log.warning("runs of %s are not captured: %s", key, error)
                self.recorded[key] = NOT_RECORDED, 0
                self.bindings.pop(key, None)
        with capturing.shared():
            return self._run(inputs, outputs, shapes, key, rows, NOT_RECORDED)

    def _run(
        self,
        inputs: Mapping[str, Sequence[np.ndarray]],
        outputs: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        key: Shapes,
        rows: int,
        number: int,
    ) -> list[np.ndarray]:
        self.runtime.use(self.device)
        for name, parts in inputs.items():
            buffer = self._buffer(name, shapes[name], self.inputs[name])
            host = buffer.array(shapes[name], self.inputs[name])
            np.concatenate(parts, out=host[:rows], casting="same_kind")
            host[rows:] = host[0]
            self.runtime.copy(buffer.device, buffer.host, host.nbytes, TO_DEVICE, self.stream)
            self.copies += 1
        binding = self._binding(shapes, outputs, key)
        options = onnxruntime.RunOptions()
        # The stream is waited for below, once for the kernels and the copies behind them.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.captured:
            options.add_run_config_entry("gpu_graph_id", str(number))
        self.session.run_with_iobinding(binding, options)
        found = []
        for name, value in zip(outputs, binding.get_outputs(), strict=True):
            shape, dtype = tuple(value.shape()), TYPES[value.data_type()]
            buffer = self._buffer(f"{name} out", shape, dtype, device=False)
            wanted = buffer.array(shape, dtype)[:rows]
            self.runtime.copy(buffer.host, value.data_ptr(), wanted.nbytes, TO_HOST, self.stream)
            self.copies += 1
            found.append(wanted)
        self.runtime.synchronize(self.stream)
        return [part.copy() for part in found]

    def warm_up(self, sample: Callable[[int], Mapping[str, np.ndarray]], outputs: Sequence[str]) -> None:
        """Run a batch until everything that is made at first runs is made. sample: inputs of so many rows."""
        inputs = {name: [value] for name, value in sample(self.size or 1).items()}
        for _ in range(RECORDING_RUNS if self.captured else 1):
            self.run(inputs, outputs)

    def _buffer(self, name: str, shape: Sequence[int], dtype: np.dtype[Any], *, device: bool = True) -> Buffer:
        """The tensor's memory, made larger where it is too small. device: also on the GPU."""
        size = int(np.prod(shape)) * dtype.itemsize
        buffer = self.buffers.get(name)
        if buffer is not None and buffer.size >= size:
            return buffer
        if buffer is not None:
            self.runtime.synchronize(self.stream)
            self.runtime.free(buffer.device, buffer.host, 0)
            self.bindings.clear()  # they, and what was recorded, hold the addresses
            self.recorded = dict.fromkeys(self.recorded, (NOT_RECORDED, 0))
        size = max(size, 1)
        buffer = Buffer(size, self.runtime.device_memory(size) if device else 0, self.runtime.host_memory(size))
        buffer.view = at(buffer.host, size)
        self.buffers[name] = buffer
        return buffer

    def _binding(
        self, shapes: Mapping[str, tuple[int, ...]], outputs: Sequence[str], key: Shapes
    ) -> onnxruntime.IOBinding:
        binding = self.bindings.get(key)
        if binding is not None:
            return binding
        binding = self.session.io_binding()
        for name, shape in shapes.items():
            buffer = self.buffers[name]
            binding.bind_input(name, self.device_name, self.device, self.inputs[name], shape, buffer.device)
        for name in outputs:
            binding.bind_output(name, self.device_name, self.device)
        if len(self.bindings) >= MOST_BINDINGS and not self.captured:
            self.bindings.clear()
        self.bindings[key] = binding
        return binding


def at(address: int, size: int) -> np.ndarray:
    """Memory at an address as uint8 [size]; it is not kept alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _release(runtime: DeviceRuntime, buffers: dict[str, Buffer], stream: int) -> None:
    for buffer in buffers.values():
        runtime.free(buffer.device, buffer.host, 0)
    runtime.free(0, 0, stream)
