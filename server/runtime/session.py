"""ONNX Runtime for one graph: lanes on GPUs where there is one, the CPU otherwise."""

from __future__ import annotations

import ctypes
import logging
import queue
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from server.process import cores
from server.runtime.cuda_runtime import CudaError, CudaRuntime
from server.runtime.device_lane import DeviceRuntime, Lane
from server.runtime.placement import Placement
from server.runtime.sized_lanes import SizedLanes, sizes_up_to

log = logging.getLogger("espalier.session")
# Without it every session with options for a provider warns that there is no plug-in of the provider's name.
onnxruntime.set_default_logger_severity(3)

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
# On many cores a single request would be slow if it had one of them to itself.
MOST_SHARES = 4
# More threads than this wait for each other longer than they compute.
MOST_THREADS = 16
# Threads that share a run wait for each other at every layer, for microseconds, and spin no longer than that. By
# default they do until long after the run, and where others want the cores it takes twice as long.
SPIN_MICROSECONDS = 100
# Of each GPU, without another word: one lane copies while the other computes.
LANES = 2
# A second session is kept where a run takes no more than this share of the time with it.
WORTH_A_SESSION = 0.9
# Others may have the cores in the moment when that is timed: for so long it is timed again.
DOUBTFUL_SECONDS = 0.5

# What goes into a run: by name an array [rows, …], or several that are put together along their first axis.
Inputs = Mapping[str, np.ndarray | Sequence[np.ndarray]]
# Inputs and the names of outputs to these.
RunOn = Callable[[Inputs, Sequence[str]], list[np.ndarray]]


@cache
def cuda_driver() -> bool:
    """Whether this machine has NVIDIA's driver: without it the provider only fills the log with errors."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    # CUDA's libraries may be in Python packages, where the loader does not look.
    onnxruntime.preload_dlls()
    return True


def usable(providers: Sequence[str]) -> list[str]:
    """Those that can be asked for here, in order of preference. providers: that are wanted; empty: CUDA where it is,
    then the CPU."""
    there = onnxruntime.get_available_providers()
    wanted = list(providers) or ([CUDA, CPU] if cuda_driver() else [CPU])
    return [provider for provider in wanted if provider in there] or [CPU]


class Session:
    """`provider`: the one that was asked for and works. `parallel`: how many threads may call `run` at once. `alone`:
    the session of all cores, for a run beside which there is none; None until `spread` has opened it."""

    def __init__(self, path: Path, placement: Placement) -> None:
        """Raises whatever ONNX Runtime raises for a graph that it cannot load."""
        asked = usable(placement.providers)
        self.path, self.placement = path, placement
        self.lanes: queue.SimpleQueue[Lane | SizedLanes] = queue.SimpleQueue()
        self.inner: onnxruntime.InferenceSession | None = None
        self.alone: onnxruntime.InferenceSession | None = None
        self.parallel = 0
        if asked[0] in (CUDA, TENSORRT):
            for lane in device_lanes(path, placement):
                self.provider: str = lane.provider
                self.lanes.put(lane)
                self.parallel += 1
        self.on_device = self.parallel > 0
        if self.on_device:
            return
        if asked[0] != CPU:
            log.warning("%s does not initialise here; %s runs on the CPU", asked[0], path)
        # Threads that share one run wait for each other at every layer; runs side by side do not. With one run more
        # than shares no core idles while the answers of a run are sent.
        shares = min(cores(), MOST_SHARES)
        self.parallel = placement.parallel or shares + 1
        self.threads = placement.threads or cores() // shares
        # Threads that spin between runs take the cores that the event loop and the decoders need.
        self.inner = open_on_cpu(path, self.threads, spinning=False)
        self.provider = CPU

    def run(self, inputs: Inputs, outputs: Sequence[str]) -> list[np.ndarray]:
        """The named outputs for one batch. Of a GPU only they come back to the host."""
        if self.inner is not None:
            return run_on_cpu(self.inner, inputs, outputs)
        parts = {name: [value] if isinstance(value, np.ndarray) else value for name, value in inputs.items()}
        lane = self.lanes.get()
        try:
            return lane.run(parts, outputs)
        finally:
            self.lanes.put(lane)

    def run_alone(self, inputs: Inputs, outputs: Sequence[str]) -> list[np.ndarray]:
        """As `run`, with all cores where that is faster; for a batch beside which none runs or waits."""
        return self.run(inputs, outputs) if self.alone is None else run_on_cpu(self.alone, inputs, outputs)

    def spread(self, seconds: Callable[[RunOn], float]) -> None:
        """Open `alone`, and keep it where it is worth its memory. seconds: that a run takes which is run so."""
        threads = min(cores(), MOST_THREADS)
        if self.on_device or not self.placement.alone or threads <= self.threads:
            return
        self.alone = open_on_cpu(self.path, threads, spinning=True)
        until = time.perf_counter() + DOUBTFUL_SECONDS
        shared, alone = seconds(self.run), seconds(self.run_alone)
        while alone > WORTH_A_SESSION * shared:
            if time.perf_counter() > until:
                self.alone = None
                return
            shared, alone = min(shared, seconds(self.run)), min(alone, seconds(self.run_alone))

    def warm_up(self, sample: Callable[[int], Mapping[str, np.ndarray]], outputs: Sequence[str]) -> None:
        """Run what the first requests would otherwise wait for. sample: inputs of so many rows."""
        if self.inner is not None:
            self.run(sample(1), outputs)
        for _ in range(self.parallel if self.on_device else 0):
            lane = self.lanes.get()
            try:
                lane.warm_up(sample, outputs)
            finally:
                self.lanes.put(lane)


def threads_of(count: int, *, spinning: bool) -> onnxruntime.SessionOptions:
    """Options of a session whose runs have so many threads. spinning: they wait for each other without sleeping."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if spinning:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    options.log_severity_level = 3
    return options


def open_on_cpu(path: Path, threads: int, *, spinning: bool) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), threads_of(threads, spinning=spinning), providers=[CPU])


def run_on_cpu(session: onnxruntime.InferenceSession, inputs: Inputs, outputs: Sequence[str]) -> list[np.ndarray]:
    whole = {name: value if isinstance(value, np.ndarray) else joined(value) for name, value in inputs.items()}
    found: list[np.ndarray] = session.run(outputs, whole)
    return found


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def device_lanes(path: Path, placement: Placement) -> Sequence[Lane | SizedLanes]:
    """As many as there are devices and instances; none where CUDA does not initialise."""
    captured = placement.captured and placement.even
    if placement.captured and not placement.even:
        log.warning("%s reads inputs of many lengths: its runs are not captured as CUDA graphs", path)
    lanes: list[Lane | SizedLanes] = []
    for device in placement.devices or (0,):
        for _ in range(placement.parallel or LANES):
            try:
                if captured or placement.tuned:
                    sized = {
                        size: lane_on(path, placement, device, size, captured) for size in sizes_up_to(placement.most)
                    }
                    lanes.append(SizedLanes(sized, captured=captured))
                else:
                    lanes.append(lane_on(path, placement, device, None, captured=False))
            except CudaError as error:
                log.warning("device %d: %s", device, error)
                return []
    return lanes


def lane_on(path: Path, placement: Placement, device: int, size: int | None, captured: bool) -> Lane:
    """Raises CudaError where CUDA does not initialise."""
    session, runtime, name, stream = open_on_device(path, placement, device, captured)
    return Lane(session, runtime, device_name=name, device=device, stream=stream, size=size, captured=captured)


def open_on_device(
    path: Path, placement: Placement, device: int, captured: bool
) -> tuple[onnxruntime.InferenceSession, DeviceRuntime, str, int]:
    """A session on a stream of its own, the runtime that made the stream, and what ONNX Runtime calls the device's
    memory. Raises CudaError where there is no such device, or the session would run on the CPU."""
    runtime = CudaRuntime()
    runtime.use(device)
    stream = runtime.stream()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(path), options, providers=device_providers(placement, device, stream, captured)
    )
    if session.get_providers()[0] not in (CUDA, TENSORRT):
        runtime.free(0, 0, stream)
        raise CudaError("ONNX Runtime's CUDA provider does not initialise")
    return session, runtime, "cuda", stream


def device_providers(
    placement: Placement, device: int, stream: int, captured: bool
) -> list[str | tuple[str, dict[str, Any]]]:
    """Providers with their options, in order."""
    cuda = {
        "device_id": str(device),
        "user_compute_stream": str(stream),
        "enable_cuda_graph": "1" if captured else "0",
        # EfficientNet-Lite0 on an H100: trying all algorithms gains nothing; channels last gain a sixth, and warm up
        # for half a minute.
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "1",
        # Memory is asked for as it is needed, not in powers of two: several models share a card.
        "arena_extend_strategy": "kSameAsRequested",
    }
    found: list[str | tuple[str, dict[str, Any]]] = [(CUDA, cuda), CPU]
    if placement.tensorrt or TENSORRT in placement.providers:
        engines = {
            "device_id": str(device),
            "user_compute_stream": str(stream),
            "trt_cuda_graph_enable": "1" if captured else "0",
            "trt_engine_cache_enable": "1" if placement.engines else "0",
            "trt_engine_cache_path": str(placement.engines or ""),
            "trt_timing_cache_enable": "1" if placement.engines else "0",
            "trt_timing_cache_path": str(placement.engines or ""),
        }
        found.insert(0, (TENSORRT, engines))
    return found
