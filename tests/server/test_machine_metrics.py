"""What is said of the machine: of a container where one is limited, of the whole where not, of GPUs where they are."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import psutil
import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server import machine_metrics
from server.machine_metrics import MachineMetrics, container_memory, container_processors
from tests.server import nvml
from tests.server.conftest import Live

Samples = dict[tuple[str, ...], float]


def scrape(collector: MachineMetrics) -> Samples:
    """Values by name and label values, as Prometheus would read them."""
    registry = CollectorRegistry()
    registry.register(collector)
    return read(generate_latest(registry).decode())


def read(text: str) -> Samples:
    return {
        (sample.name.removeprefix("espalier_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(("espalier_machine", "espalier_disk", "espalier_gpu"))
    }


def group(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    return folder


def test_the_machine_is_as_another_reader_sees_it(tmp_path: Path) -> None:
    found = scrape(MachineMetrics({"home": tmp_path}, group=tmp_path / "none"))
    memory, cpu, disk = psutil.virtual_memory(), psutil.cpu_times(), psutil.disk_usage(str(tmp_path))
    assert found["machine_cpu_cores",] == os.cpu_count()
    whole = found["machine_memory_bytes", "used"] + found["machine_memory_bytes", "available"]
    assert whole == memory.total
    assert found["machine_memory_bytes", "available"] == pytest.approx(memory.available, rel=0.1)
    assert found["machine_cpu_seconds_total", "user"] == pytest.approx(cpu.user + cpu.nice, rel=0.05)
    assert found["machine_cpu_seconds_total", "idle"] == pytest.approx(cpu.idle, rel=0.05)
    assert found["disk_bytes", "home", "free"] == pytest.approx(disk.free, rel=0.05)
    assert found["disk_bytes", "home", "used"] == pytest.approx(disk.used, rel=0.05)


def test_a_limited_container_is_measured_by_its_limits(tmp_path: Path) -> None:
    folder = group(
        tmp_path,
        cpu_max="150000 100000\n",
        cpu_stat="usage_usec 7000000\nuser_usec 5000000\nsystem_usec 2000000\nnr_throttled 3\nthrottled_usec 500000\n",
        memory_max=f"{4 * 2**30}\n",
        memory_current=f"{3 * 2**30}\n",
        memory_stat=f"anon {2 * 2**30}\ninactive_file {2**30}\nactive_file 0\n",
    )
    found = scrape(MachineMetrics({}, group=folder))
    assert found["machine_cpu_cores",] == 1.5
    assert found["machine_cpu_seconds_total", "user"] == 5
    assert found["machine_cpu_seconds_total", "system"] == 2
    assert found["machine_cpu_seconds_total", "throttled"] == 0.5
    assert ("machine_cpu_seconds_total", "idle") not in found
    assert found["machine_memory_bytes", "used"] == 2 * 2**30
    assert found["machine_memory_bytes", "available"] == 2 * 2**30


def test_a_container_without_limits_may_use_the_whole_machine(tmp_path: Path) -> None:
    folder = group(tmp_path, cpu_max="max 100000\n", memory_max="max\n", memory_current="1\n", memory_stat="anon 1\n")
    assert container_processors(folder) is container_memory(folder) is None
    found = scrape(MachineMetrics({}, group=folder))
    assert found["machine_cpu_cores",] == os.cpu_count()


def test_a_system_that_tells_nothing_costs_nothing_but_the_figures(tmp_path: Path) -> None:
    found = scrape(MachineMetrics({"home": tmp_path / "gone"}, group=tmp_path / "none", proc=tmp_path / "none"))
    assert found == {}


def test_a_disk_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    found = scrape(MachineMetrics({"home": tmp_path, "repository": tmp_path / "repository"}))
    assert {key[1:] for key in found if key[0] == "disk_bytes"} == {("home", "used"), ("home", "free")}


def test_every_gpu_is_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_metrics, "pynvml", nvml.fake(cards=2))
    found = scrape(MachineMetrics({}))
    assert found["gpu_utilization_ratio", "0"] == 0.25
    assert found["gpu_utilization_ratio", "1"] == 0.26
    assert found["gpu_memory_bytes", "1", "used"] == 30 * 2**30
    assert found["gpu_memory_bytes", "1", "free"] == 50 * 2**30
    assert found["gpu_power_watts", "0"] == 215.5
    assert found["gpu_temperature_celsius", "0"] == 54
    assert found["gpu_info", "0", "NVIDIA H100 80GB HBM3"] == 1


def test_what_a_card_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = frozenset({"nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage"})
    monkeypatch.setattr(machine_metrics, "pynvml", nvml.fake(cards=1, unsupported=unknown))
    found = scrape(MachineMetrics({}))
    assert ("gpu_utilization_ratio", "0") not in found
    assert ("gpu_power_watts", "0") not in found
    assert found["gpu_memory_bytes", "0", "used"] == 30 * 2**30


@pytest.mark.parametrize("module", [None, nvml.fake(driver=False)])
def test_without_the_package_or_the_driver_there_are_no_gpus(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_metrics, "pynvml", module)
    assert not [key for key in scrape(MachineMetrics({})) if key[0].startswith("gpu")]


def test_the_stand_in_has_the_signatures_of_the_real_library() -> None:
    for name, function in vars(nvml.fake()).items():
        if name.startswith("nvml"):
            real = inspect.signature(inspect.unwrap(getattr(pynvml, name)))
            assert list(inspect.signature(function).parameters) == list(real.parameters), name


def test_the_server_tells_of_its_machine(live: Live) -> None:
    found = read(live.client.get("/metrics").text)
    assert found["machine_cpu_cores",] > 0
    assert found["disk_bytes", "home", "free"] > 0
