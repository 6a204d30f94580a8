"""A GPU that is none: NVIDIA's library as far as we call it, with the host's memory for the device's, and sessions that
are created on the CPU's provider. Nothing else is replaced: what runs is the code that runs on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from server.runtime.cuda_runtime import CudaRuntime
from server.runtime.placement import Placement

ALREADY_FREED = 17


class HostLibrary:
    """As libcudart: functions of ctypes values that return 0, or a number for what went wrong."""

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices
        self.device: dict[int, np.ndarray] = {}
        self.host: dict[int, np.ndarray] = {}
        self.streams: set[int] = set()
        self.made = 0
        # Copies that are on a stream, and done when it is waited for: (target, source, bytes).
        self.waiting: dict[int, list[tuple[int, int, int]]] = {}
        self.cudaGetErrorString = ErrorString()

    def cudaSetDevice(self, device: Any) -> int:
        return 0 if device.value < self.devices else 101

    def cudaStreamCreateWithFlags(self, stream: Any, flags: Any) -> int:
        self.made += 1
        stream._obj.value = self.made
        self.streams.add(self.made)
        self.waiting[self.made] = []
        return 0

    def cudaStreamDestroy(self, stream: Any) -> int:
        self.streams.remove(stream.value)
        return 0

    def cudaMalloc(self, pointer: Any, size: Any) -> int:
        return self._take(self.device, pointer, size)

    def cudaHostAlloc(self, pointer: Any, size: Any, flags: Any) -> int:
        return self._take(self.host, pointer, size)

    def _take(self, kept: dict[int, np.ndarray], pointer: Any, size: Any) -> int:
        memory = np.full(size.value, 0xAA, np.uint8)
        pointer._obj.value = memory.ctypes.data
        kept[memory.ctypes.data] = memory
        return 0

    def cudaFree(self, pointer: Any) -> int:
        return 0 if self.device.pop(pointer.value, None) is not None else ALREADY_FREED

    def cudaFreeHost(self, pointer: Any) -> int:
        return 0 if self.host.pop(pointer.value, None) is not None else ALREADY_FREED

    def cudaMemcpyAsync(self, target: Any, source: Any, size: Any, kind: Any, stream: Any) -> int:
        if kind.value == 1:  # the provider of these sessions computes at once, and so its inputs must be there
            ctypes.memmove(target.value, source.value, size.value)
        elif size.value:
            self.waiting[stream.value].append((target.value, source.value, size.value))
        return 0

    def cudaStreamSynchronize(self, stream: Any) -> int:
        for copy in self.waiting[stream.value]:
            ctypes.memmove(*copy)
        self.waiting[stream.value].clear()
        return 0


class ErrorString:
    restype: Any = None

    def __call__(self, code: int) -> bytes:
        return {101: b"invalid device ordinal"}.get(code, b"unknown error")


def runtime(library: HostLibrary) -> CudaRuntime:
    made = CudaRuntime.__new__(CudaRuntime)
    made.library = library  # type: ignore[assignment]  # as ctypes.CDLL to those who call it
    return made


def opener(library: HostLibrary, sessions: list[onnxruntime.InferenceSession] | None = None) -> Any:
    """In place of `server.runtime.session.open_on_device`."""

    def open_on_device(path: Path, placement: Placement, device: int, captured: bool) -> Any:
        found = runtime(library)
        found.use(device)
        stream = found.stream()
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        if sessions is not None:
            sessions.append(session)
        return session, found, "cpu", stream

    return open_on_device
