"""What a front-end counts is added to the counts of the inference process, whose /metrics are those of the server."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from server.access import Access
from server.frontends.messages import Counted
from server.histograms import Histograms
from server.metrics import Metrics


def families(metrics: Metrics, access: Access) -> dict[str, Any]:
    """By name, what one of them counts by labels."""
    found = {**vars(metrics), **vars(access)}
    return {name: family for name, family in found.items() if isinstance(family, defaultdict | Histograms)}


def take(number: int, metrics: Metrics, access: Access, proxied: int) -> Counted:
    """What was counted since the last time; it begins anew."""
    counts, distributions = {}, {}
    for name, family in families(metrics, access).items():
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


def add(counted: Counted, metrics: Metrics, access: Access) -> None:
    known = families(metrics, access)
    for name, counts in counted.counts.items():
        family = known[name]
        for labels, count in counts:
            family[tuple(labels)] += count
    for name, distributions in counted.distributions.items():
        for labels, there, total in distributions:
            child = known[name].labels(*labels)
            child.counts[:] = [one + other for one, other in zip(child.counts, there, strict=True)]
            child.sum += total
