"""What a dashboard asks Prometheus, as Grafana would: variables filled in, legends made of labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class Question(NamedTuple):
    """One query of one panel."""

    panel: str
    kind: str
    expr: str
    legend: str


def questions(dashboard: Mapping[str, Any], values: Mapping[str, str]) -> Iterator[Question]:
    """Of every panel. values: of the template variables, and of $__rate_interval."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield Question(panel["title"], panel["type"], filled(target["expr"], values), target["legendFormat"])


def filled(expr: str, values: Mapping[str, str]) -> str:
    """Raises KeyError for a variable that has no value."""
    return VARIABLE.sub(lambda found: values[found[1] or found[2]], expr)


def legend(words: str, labels: Mapping[str, str]) -> str:
    """{{label}} filled in; without words, the labels."""
    if not words:
        return ", ".join(f"{name}={value}" for name, value in labels.items())
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), words).strip()
