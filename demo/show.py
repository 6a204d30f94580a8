"""Held-out results in a terminal: accuracy, latency, confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo.client import Answer


def results(console: Console, title: str, answers: Sequence[Answer], truth: Sequence[str], seconds: float) -> float:
    """Print accuracy, latency and the confusion matrix (rows: truth, columns: answers); the accuracy."""
    labels = sorted(set(truth) | {answer.label for answer in answers})
    index = {label: i for i, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels)), dtype=int)
    for answer, label in zip(answers, truth, strict=True):
        matrix[index[label], index[answer.label]] += 1
    accuracy = float(np.trace(matrix) / matrix.sum())
    milliseconds = np.array([answer.seconds for answer in answers]) * 1e3
    p50, p99 = np.percentile(milliseconds, [50, 99])
    console.print(
        f"\n[bold]{title}[/]: {accuracy:.4f} of {len(truth)} held-out samples right;"
        f" {len(truth) / seconds:.0f} requests/s, median {p50:.1f} ms, p99 {p99:.1f} ms"
    )
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("", justify="right", style="dim")
    for label in labels:
        table.add_column(label, justify="right")
    for label, row in zip(labels, matrix, strict=True):
        cells = [
            Text(str(count) if count else "·", style="bold green" if label == column else "red" if count else "dim")
            for column, count in zip(labels, row, strict=True)
        ]
        table.add_row(label, *cells)
    console.print(table)
    return accuracy
