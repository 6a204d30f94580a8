"""A stand-in for pynvml, NVIDIA's bindings of its management library: two cards and no driver.

Its functions have the names, the parameters and the kinds of answers of the real ones, which a test compares.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pynvml

GIB = 2**30


def fake(cards: int = 2, *, driver: bool = True, unsupported: frozenset[str] = frozenset()) -> ModuleType:
    """cards: how many there are. driver: whether there is one. unsupported: functions that the cards do not know."""
    module = ModuleType("pynvml")

    def known(function: str) -> None:
        if function in unsupported:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlInit() -> None:
        if not driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlDeviceGetCount() -> int:
        return cards

    def nvmlDeviceGetHandleByIndex(index: int) -> int:
        assert 0 <= index < cards
        return 100 + index

    def nvmlDeviceGetName(handle: int) -> str:
        known("nvmlDeviceGetName")
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetUtilizationRates(handle: int) -> SimpleNamespace:
        known("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=25 + handle - 100, memory=10)  # per cent

    def nvmlDeviceGetMemoryInfo(handle: int, version: int | None = None) -> SimpleNamespace:
        known("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(total=80 * GIB, used=30 * GIB, free=50 * GIB)

    def nvmlDeviceGetPowerUsage(handle: int) -> int:
        known("nvmlDeviceGetPowerUsage")
        return 215_500  # milliwatts

    def nvmlDeviceGetTemperature(handle: int, sensor: int) -> int:
        known("nvmlDeviceGetTemperature")
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return 54

    for name, value in list(locals().items()):
        if name.startswith("nvml"):
            setattr(module, name, value)
    module.NVMLError = pynvml.NVMLError  # type: ignore[attr-defined]
    module.NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU  # type: ignore[attr-defined]
    return module
