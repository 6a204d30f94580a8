"""What a front-end counts is added to the counts of the inference process, whose /metrics are those of the server."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

from prometheus_client.core import Exemplar

from server.access import Access
from server.frontends.messages import Counted, CountedDistribution
from server.histograms import Distribution, Histograms
from server.metrics import Metrics


def families(metrics: Metrics, access: Access) -> dict[str, Any]:
    """By name, what one of them counts by labels."""
    found = {**vars(metrics), **vars(access)}
    return {
        name: family
        for name, family in found.items()
        if isinstance(family, Histograms) or (isinstance(family, defaultdict) and family.default_factory is int)
    }


def take(number: int, metrics: Metrics, access: Access, proxied: int) -> Counted:
    """What was counted since the last time; it begins anew."""
    counts, distributions = {}, {}
    for name, family in families(metrics, access).items():
        if isinstance(family, defaultdict):
            counts[name] = [(list(labels), count) for labels, count in family.items()]
            family.clear()
        elif isinstance(family, Histograms):
            touched = [(labels, child) for labels, child in family.children.items() if any(child.counts)]
            distributions[name] = [counted_of(labels, child) for labels, child in touched]
    return Counted(number, counts, distributions, proxied)


def add(counted: Counted, metrics: Metrics, access: Access) -> None:
    known = families(metrics, access)
    for name, counts in counted.counts.items():
        family = known[name]
        for labels, count in counts:
            family[tuple(labels)] += count
    for name, distributions in counted.distributions.items():
        for one in distributions:
            child = known[name].labels(*one.labels)
            child.counts[:] = [here + there for here, there in zip(child.counts, one.counts, strict=True)]
            child.sum += one.sum
            for bucket, pointers, value, at in one.exemplars:
                child.exemplars[bucket] = Exemplar(pointers, value, at)


def counted_of(labels: Sequence[str], child: Distribution) -> CountedDistribution:
    """Its numbers and exemplars, which it has no longer."""
    exemplars = [(bucket, one.labels, one.value, cast(float, one.timestamp)) for bucket, one in child.exemplars.items()]
    found = CountedDistribution(list(labels), child.counts[:], child.sum, exemplars)
    child.counts[:] = [0] * len(child.counts)
    child.sum = 0.0
    child.exemplars.clear()
    return found
