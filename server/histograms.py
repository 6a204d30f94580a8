"""Histograms of the hot path: plain numbers that one thread touches, turned into metrics when they are asked for.

One of prometheus-client costs microseconds an observation, a list and a bisection a tenth of that.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import Exemplar, HistogramMetricFamily, Metric


class Distribution:
    """One histogram's numbers. Not for threads: one alone observes."""

    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        # The newest value of each bucket that a trace is known of.
        self.exemplars: dict[int, Exemplar] = {}

    def observe(self, value: float, exemplar: Mapping[str, str] | None = None) -> None:
        """exemplar: labels, at most 128 characters in all, by which this one can be looked up elsewhere."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        if exemplar is not None:
            self.point_at(value, exemplar)

    def point_at(self, value: float, exemplar: Mapping[str, str]) -> None:
        """Make one that was observed before the exemplar of its bucket."""
        self.exemplars[bisect_left(self.bounds, value)] = Exemplar(dict(exemplar), value, time.time())


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
            total = 0
            buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
            for i, bound in enumerate([*map(str, map(float, self.bounds)), "+Inf"]):
                total += child.counts[i]
                exemplar = child.exemplars.get(i)
                buckets.append((bound, total) if exemplar is None else (bound, total, exemplar))
            family.add_metric(values, buckets, child.sum)
        yield family
