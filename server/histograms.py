"""Histograms of the hot path: plain numbers that one thread touches, turned into metrics when they are asked for.

One of prometheus-client costs microseconds an observation, a list and a bisection a tenth of that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric


class Distribution:
    """One histogram's numbers. Not for threads: one alone observes."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Histograms:
    """A family of distributions by label values; a collector of prometheus-client."""

    def __init__(self, name: str, words: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self.name, self.words, self.label_names, self.bounds = name, words, labels, bounds
        self.children: dict[tuple[str, ...], Distribution] = {}

    def labels(self, *values: str) -> Distribution:
        """The distribution of these label values; keep it and observe on it."""
        return self.children.setdefault(values, Distribution(self.bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self.name, self.words, labels=self.label_names)
        for values, child in list(self.children.items()):
            total, buckets = 0, []
            for bound, count in zip([*map(str, map(float, self.bounds)), "+Inf"], child.counts, strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric(values, buckets, child.sum)
        yield family
