"""The few calls of NVIDIA's CUDA runtime that a session needs beside ONNX Runtime: streams, memory, copies.

ONNX Runtime has loaded the library already; it copies from ordinary memory, on a stream of its own, and waits after
each copy. From page-locked memory a copy is several times as fast and goes on beside the computing.
"""

from __future__ import annotations

import ctypes
from typing import Any

LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
TO_DEVICE, TO_HOST = 1, 2
NON_BLOCKING = 1


class CudaError(RuntimeError):
    """A call of the CUDA runtime that failed; the message has its name for what went wrong."""


class CudaRuntime:
    """Addresses, streams: plain numbers. Raises CudaError where the library is missing or a call fails."""

    def __init__(self) -> None:
        for name in LIBRARIES:
            try:
                self.library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise CudaError(f"none of {', '.join(LIBRARIES)} can be loaded")
        self.library.cudaGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise CudaError(f"{name}: {self.library.cudaGetErrorString(code).decode()}")

    def _made(self, name: str, *arguments: Any) -> int:
        """What a call puts where its first argument points."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made.value or 0

    def use(self, device: int) -> None:
        """Make it this thread's device: memory and streams are made on it."""
        self.call("cudaSetDevice", ctypes.c_int(device))

    def stream(self) -> int:
        return self._made("cudaStreamCreateWithFlags", ctypes.c_uint(NON_BLOCKING))

    def synchronize(self, stream: int) -> None:
        """Wait, without Python's lock, for all that was put on the stream."""
        self.call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def device_memory(self, size: int) -> int:
        return self._made("cudaMalloc", ctypes.c_size_t(size))

    def host_memory(self, size: int) -> int:
        """Page-locked."""
        return self._made("cudaHostAlloc", ctypes.c_size_t(size), ctypes.c_uint(0))

    def copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        """Put a copy on the stream. kind: TO_DEVICE or TO_HOST."""
        pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self.call("cudaMemcpyAsync", *pointers, ctypes.c_size_t(size), ctypes.c_int(kind), ctypes.c_void_p(stream))

    def free(self, device: int, host: int, stream: int) -> None:
        """Give back what is not 0."""
        if device:
            self.library.cudaFree(ctypes.c_void_p(device))
        if host:
            self.library.cudaFreeHost(ctypes.c_void_p(host))
        if stream:
            self.library.cudaStreamDestroy(ctypes.c_void_p(stream))
