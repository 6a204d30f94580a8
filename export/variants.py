"""The same network in fewer bits: which of the precisions that were asked for are good enough, and which one serves.

Each is judged by the metrics on data held out, through its own graph, as that of float32 is. It is kept when none of
them is worse by more than is allowed, and serves where it is the fastest. What ONNX Runtime fuses as it loads a graph
is not written down: it depends on the provider.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import msgspec
import numpy as np

from export import half_precision, int8
from export.bundle import Precision, Provider, Variant
from export.graph_session import PROVIDERS, opened
from export.half import LARGEST

Inputs = Mapping[str, np.ndarray]

SECONDS = 1.0
ROUNDS = 5


@dataclass(frozen=True)
class Optimization:
    """precisions: that are tried. most_loss: the share of each metric of float32 that may be lost. judge: metrics on
    data held out, through the graph at a path on a provider. falling: those of which less is better. calibration:
    batches of inputs that nothing is judged on. sample: the batch that graphs are timed with. text: whether they read
    texts."""

    precisions: Sequence[Precision]
    most_loss: float
    judge: Callable[[Path, Provider], Mapping[str, float]]
    falling: frozenset[str]
    calibration: Sequence[Inputs]
    sample: Inputs
    text: bool


Kind = Literal["float32", "float16", "bfloat16", "int8"]


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the report. metrics: on held-out data; samples_per_second: by provider, of those that are here.
    reason: why it is not kept."""

    precision: Kind
    kept: bool
    reason: str | None = None
    bytes: int
    metrics: dict[str, float] = {}
    samples_per_second: dict[Provider, float] = {}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """optimization.json. serving: which precision a provider is given."""

    most_loss: float
    rows: int
    tried: list[Tried]
    serving: dict[Provider, Kind]


def add_variants(
    folder: Path, wanted: Optimization, progress: Callable[[str], None]
) -> tuple[list[Variant], dict[Provider, Precision], Report]:
    """Write `model.<precision>.onnx` beside folder/model.onnx for each precision that is good enough."""
    whole = folder / "model.onnx"
    reference = dict(wanted.judge(whole, "cpu"))
    here = _providers()
    tried = [
        Tried(
            precision="float32",
            kept=True,
            bytes=_size(whole),
            metrics=reference,
            samples_per_second=_speeds(whole, wanted.sample, here),
        )
    ]
    variants = []
    for precision in dict.fromkeys(wanted.precisions):
        progress(f"trying {precision}")
        found = _try(whole, precision, wanted, reference, here)
        tried.append(found)
        progress(sentence(found, tried[0]))
        if found.kept:
            variants.append(Variant(precision=precision, metrics=found.metrics, speeds=found.samples_per_second))
    serving = _serving(tried, here)
    rows = len(next(iter(wanted.sample.values())))
    words: dict[Provider, Kind] = {provider: serving.get(provider, "float32") for provider in PROVIDERS}
    return variants, serving, Report(most_loss=wanted.most_loss, rows=rows, tried=tried, serving=words)


def _try(
    whole: Path, precision: Precision, wanted: Optimization, reference: Mapping[str, float], here: Sequence[Provider]
) -> Tried:
    target = whole.with_name(f"model.{precision}.onnx")
    best: Tried | None = None
    for write in _ways(whole, target, precision, wanted, here):
        try:
            write()
            # Where it will serve: the CPU computes in float32 what float16 is stored in.
            metrics = dict(wanted.judge(target, "cpu" if precision == "int8" else here[-1]))
        except Exception as error:  # onnxruntime's own classes, for a graph that it cannot run
            target.unlink(missing_ok=True)
            why = str(error).splitlines()[0]
            best = best or Tried(precision=precision, kept=False, reason=why, bytes=0)
            continue
        name, share = worst(reference, metrics, wanted.falling)
        kept = share <= wanted.most_loss  # false of NaN
        found = Tried(
            precision=precision,
            kept=kept,
            reason=None
            if kept
            else f"{name} is {100 * share:.2g} in 100 worse, {100 * wanted.most_loss:g} are allowed",
            bytes=_size(target),
            metrics=metrics,
            samples_per_second=_speeds(target, wanted.sample, here),
        )
        if kept:
            return found
        best = found
        target.unlink()
    assert best is not None, "there is a way for every precision"
    return best


def _ways(
    whole: Path, target: Path, precision: Precision, wanted: Optimization, here: Sequence[Provider]
) -> list[Callable[[], None]]:
    """What to do one after the other until one is good enough."""
    if precision == "int8":
        if wanted.text:
            return [lambda: int8.dynamic(whole, target)]
        return [
            lambda: int8.static(whole, target, wanted.calibration, ends=True),
            lambda: int8.static(whole, target, wanted.calibration, ends=False),
        ]

    def halve() -> None:
        if precision == "bfloat16" and "cuda" not in here:
            raise ValueError("bfloat16 runs on CUDA only, and there is none here to judge it on")
        name, largest = half_precision.largest_values(whole, wanted.calibration)
        if precision == "float16" and not largest <= LARGEST:
            raise ValueError(f"float16 ends at {LARGEST:,.0f}, and {name} reaches {largest:,.0f}")
        half_precision.half(whole, target, precision)

    return [halve]


def worst(reference: Mapping[str, float], found: Mapping[str, float], falling: frozenset[str]) -> tuple[str, float]:
    """The metric that has lost the largest share of its value, and that share."""
    shares = {
        name: (found[name] - value if name in falling else value - found[name]) / max(abs(value), 1e-12)
        for name, value in reference.items()
    }
    name = max(shares, key=lambda one: np.inf if np.isnan(shares[one]) else shares[one])
    return name, shares[name]


def sentence(found: Tried, reference: Tried) -> str:
    if not found.kept:
        return f"{found.precision} is not kept: {found.reason}"
    metrics = ", ".join(
        f"{name.replace('_', ' ')} {value:.4f} ({reference.metrics[name]:.4f})" for name, value in found.metrics.items()
    )
    speeds = ", ".join(
        f"{value / reference.samples_per_second[provider]:.2f} times the speed on {provider}"
        for provider, value in found.samples_per_second.items()
    )
    return f"{found.precision} is kept: {metrics}, {found.bytes / reference.bytes:.2f} of the bytes, {speeds}"


def _serving(tried: Sequence[Tried], here: Sequence[Provider]) -> dict[Provider, Precision]:
    """The fastest by provider, of those that are here to be timed, where it is not float32."""
    found: dict[Provider, Precision] = {}
    for provider in here:
        kept = [one for one in tried[1:] if one.kept and (provider == "cuda" or one.precision == "int8")]
        fastest = max([tried[0], *kept], key=lambda one: one.samples_per_second[provider]).precision
        if fastest != "float32":
            found[provider] = fastest
    return found


def _providers() -> list[Provider]:
    """Those that work here."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _speeds(path: Path, sample: Inputs, here: Sequence[Provider]) -> dict[Provider, float]:
    return {provider: _speed(path, sample, provider) for provider in here}


def _speed(path: Path, sample: Inputs, provider: Provider) -> float:
    """Samples a second with the runtime's default settings: the median of some rounds."""
    session = opened(path, provider)
    rows, inputs = len(next(iter(sample.values()))), dict(sample)
    session.run(None, inputs)
    found = []
    for _ in range(ROUNDS):
        start, runs = time.perf_counter(), 0
        while runs == 0 or time.perf_counter() - start < SECONDS / ROUNDS:
            session.run(None, inputs)
            runs += 1
        found.append(rows * runs / (time.perf_counter() - start))
    return median(found)


def _size(path: Path) -> int:
    beside = path.with_name(path.name + ".data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
