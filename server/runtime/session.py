"""An ONNX Runtime session for one bundle: CUDA where there is one, the CPU otherwise."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from server.process import cores

log = logging.getLogger("espalier.session")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# On many cores a single request would be slow if it had one of them to itself.
MOST_SHARES = 4


def cuda_driver() -> bool:
    """Whether this machine has NVIDIA's driver: without it the provider only fills the log with errors."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def usable(providers: Sequence[str]) -> list[str]:
    """Those that can be asked for here, in order of preference. providers: that are wanted; empty: CUDA where it is,
    then the CPU."""
    there = onnxruntime.get_available_providers()
    wanted = list(providers) or ([CUDA, CPU] if cuda_driver() else [CPU])
    return [provider for provider in wanted if provider in there] or [CPU]


class Session:
    """`provider`: the one that was asked for and works. `parallel`: how many threads may call `run` at once."""

    def __init__(self, path: Path, providers: Sequence[str], parallel_runs: int, intra_op_threads: int) -> None:
        """providers: as `usable` takes them. parallel_runs: on the CPU; 0 for one more than there are shares of cores.
        intra_op_threads: of one run; 0 for all cores of a share.

        Raises whatever ONNX Runtime raises for a graph that it cannot load.
        """
        options = onnxruntime.SessionOptions()
        # Threads that share one run wait for each other at every layer; runs side by side do not. With one run more
        # than shares no core idles while the answers of a run are sent.
        shares = min(cores(), MOST_SHARES)
        self.parallel = parallel_runs or shares + 1
        options.intra_op_num_threads = intra_op_threads or cores() // shares
        # Threads that spin between runs take the cores that the event loop and the decoders need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        asked = usable(providers)
        self.inner = onnxruntime.InferenceSession(str(path), options, providers=asked)
        self.provider: str = self.inner.get_providers()[0]
        if self.provider != asked[0]:
            log.warning("%s does not initialise here; %s runs on %s", asked[0], path, self.provider)
        self.on_device = self.provider == CUDA
        if self.on_device:
            self.parallel = 1

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """The named outputs for one batch of graph inputs. On CUDA only they come back to the host."""
        if not self.on_device:
            found: list[np.ndarray] = self.inner.run(outputs, inputs)
            return found
        binding = self.inner.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        self.inner.run_with_iobinding(binding)
        copied: list[np.ndarray] = binding.copy_outputs_to_cpu()
        return copied
