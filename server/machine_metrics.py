"""What the machine does under the server: its cores, its memory, the disks of its folders, its GPUs.

In a container whose CPU or memory is limited (cgroup v2), cores and memory are the container's: what counts is what may
be used. Everything is read when it is asked for; what this system does not tell is left out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

try:
    import pynvml
except ImportError:  # no package, no figures of GPUs
    pynvml = None

GROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")


class Processors(NamedTuple):
    """cores: that may be used; a container may have a part of one. seconds: of CPU time, by what it was spent on."""

    cores: float
    seconds: dict[str, float]


class Memory(NamedTuple):
    """Bytes. used: what cannot be given back without swapping; available: all others, with the cache of files."""

    used: int
    available: int


class MachineMetrics:
    """A collector of prometheus-client. folders: those whose disks are watched, by what they are to the server."""

    def __init__(self, folders: Mapping[str, Path], group: Path = GROUP, proc: Path = PROC) -> None:
        self.folders, self.group, self.proc = folders, group, proc
        self.gpus = _gpus()

    def collect(self) -> Iterator[Metric]:
        if (processors := container_processors(self.group) or machine_processors(self.proc)) is not None:
            cores = GaugeMetricFamily("espalier_machine_cpu_cores", "cores that the server may use")
            cores.add_metric([], processors.cores)
            yield cores
            seconds = CounterMetricFamily(
                "espalier_machine_cpu_seconds", "CPU time of the machine, or of the container", labels=["mode"]
            )
            for mode, spent in processors.seconds.items():
                seconds.add_metric([mode], spent)
            yield seconds
        if (memory := container_memory(self.group) or machine_memory(self.proc)) is not None:
            held = GaugeMetricFamily(
                "espalier_machine_memory_bytes", "memory of the machine, or of the container", labels=["state"]
            )
            for state, size in memory._asdict().items():
                held.add_metric([state], size)
            yield held
        yield self._disks()
        yield from self._devices()

    def _disks(self) -> Metric:
        disks = GaugeMetricFamily(
            "espalier_disk_bytes", "space on the disks of the server's folders", labels=["folder", "state"]
        )
        seen: set[int] = set()
        for name, folder in self.folders.items():
            with suppress(OSError):  # not there yet, or no folder of this machine
                if (device := folder.stat().st_dev) in seen:
                    continue
                seen.add(device)
                usage = shutil.disk_usage(folder)
                disks.add_metric([name, "used"], usage.used)
                disks.add_metric([name, "free"], usage.free)
        return disks

    def _devices(self) -> Iterator[Metric]:
        labels = ["device"]
        info = GaugeMetricFamily("espalier_gpu_info", "1 for every GPU; what it is", labels=[*labels, "name"])
        utilization = GaugeMetricFamily(
            "espalier_gpu_utilization_ratio", "share of the last sampling period in which a kernel ran", labels=labels
        )
        memory = GaugeMetricFamily("espalier_gpu_memory_bytes", "memory of the GPU", labels=[*labels, "state"])
        power = GaugeMetricFamily("espalier_gpu_power_watts", "what the GPU draws", labels=labels)
        temperature = GaugeMetricFamily("espalier_gpu_temperature_celsius", "of the GPU's die", labels=labels)
        for number, handle in enumerate(self.gpus):
            device = str(number)
            # A card, a virtual one or a slice of one need not know all of this; and it may fall off the bus.
            with suppress(pynvml.NVMLError):
                info.add_metric([device, _text(pynvml.nvmlDeviceGetName(handle))], 1)
            with suppress(pynvml.NVMLError):
                utilization.add_metric([device], pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            with suppress(pynvml.NVMLError):
                held = pynvml.nvmlDeviceGetMemoryInfo(handle)
                memory.add_metric([device, "used"], held.used)
                memory.add_metric([device, "free"], held.free)
            with suppress(pynvml.NVMLError):
                power.add_metric([device], pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
            with suppress(pynvml.NVMLError):
                die = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
                temperature.add_metric([device], die)
        if self.gpus:
            yield from (info, utilization, memory, power, temperature)


def container_processors(group: Path) -> Processors | None:
    """Of the container this process is in; None outside of one, and where its CPU is not limited."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        if quota == "max":
            return None
        spent = {key: int(value) / 1e6 for key, value in map(str.split, (group / "cpu.stat").read_text().splitlines())}
    except (OSError, ValueError):
        return None
    modes = {"user": "user_usec", "system": "system_usec", "throttled": "throttled_usec"}
    return Processors(int(quota) / int(period), {mode: spent[key] for mode, key in modes.items() if key in spent})


def machine_processors(proc: Path) -> Processors | None:
    """Of the whole machine; None where there is no /proc."""
    try:
        ticks = [int(word) for word in (proc / "stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    user, nice, system, idle, iowait, interrupts, softly, stolen = ticks[:8]
    modes = {
        "user": user + nice,  # guests are in these two already
        "system": system + interrupts + softly,
        "idle": idle,
        "iowait": iowait,
        "steal": stolen,
    }
    hertz = os.sysconf("SC_CLK_TCK")
    return Processors(os.cpu_count() or 1, {mode: count / hertz for mode, count in modes.items()})


def container_memory(group: Path) -> Memory | None:
    """Of the container this process is in; None outside of one, and where its memory is not limited."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        held = int((group / "memory.current").read_text())
        parts = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
    except (OSError, ValueError):
        return None
    # What Kubernetes calls the working set: beyond it are files that were read and not looked at since.
    used = max(held - int(parts.get("inactive_file", 0)), 0)
    return Memory(used, max(int(limit) - used, 0))


def machine_memory(proc: Path) -> Memory | None:
    """Of the whole machine; None where there is no /proc."""
    try:
        lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
        sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
        return Memory(sizes["MemTotal"] - sizes["MemAvailable"], sizes["MemAvailable"])
    except (OSError, ValueError, KeyError):
        return None


def _gpus() -> list[Any]:
    """NVML's handles of the GPUs; none where its package or the driver is missing."""
    if pynvml is None:
        return []
    handle: Callable[[int], Any] = pynvml.nvmlDeviceGetHandleByIndex
    try:
        pynvml.nvmlInit()
        return [handle(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _text(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode(errors="replace")
