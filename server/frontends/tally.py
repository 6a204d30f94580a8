"""What a front-end counts is added to the counts of the inference process, whose /metrics are those of the server."""

from __future__ import annotations

from collections import defaultdict

from server.frontends.messages import Counted
from server.histograms import Histograms
from server.metrics import Metrics


def take(number: int, metrics: Metrics, proxied: int) -> Counted:
    """What was counted since the last time; it begins anew."""
    counts, distributions = {}, {}
    for name, family in vars(metrics).items():
        if isinstance(family, defaultdict):
            counts[name] = [(list(labels), count) for labels, count in family.items()]
            family.clear()
        elif isinstance(family, Histograms):
            touched = [(labels, child) for labels, child in family.children.items() if any(child.counts)]
            distributions[name] = [(list(labels), child.counts[:], child.sum) for labels, child in touched]
            for _, child in touched:
                child.counts[:] = [0] * len(child.counts)
                child.sum = 0.0
    return Counted(number, counts, distributions, proxied)


def add(counted: Counted, metrics: Metrics) -> None:
    for name, counts in counted.counts.items():
        family = getattr(metrics, name)
        for labels, count in counts:
            family[tuple(labels)] += count
    for name, distributions in counted.distributions.items():
        family = getattr(metrics, name)
        for labels, counts, total in distributions:
            child = family.labels(*labels)
            child.counts[:] = [here + there for here, there in zip(child.counts, counts, strict=True)]
            child.sum += total
