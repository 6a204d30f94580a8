"""Counts of one version of a model, as the statistics extension of the inference protocol asks for them."""

from __future__ import annotations

import time


class Statistics:
    """last: when a run ended last, seconds since the epoch; 0.0 before the first. requests, request_seconds: requests
    that were in a run, and the time of their runs added up. runs: by rows, how many runs and their seconds. failed:
    requests that ended in an error, and their seconds. Not for threads: one alone counts."""

    __slots__ = ("failed", "failed_seconds", "last", "request_seconds", "requests", "rows", "runs")

    def __init__(self) -> None:
        self.last = 0.0
        self.requests = 0
        self.rows = 0
        self.request_seconds = 0.0
        self.runs: dict[int, list[float]] = {}
        self.failed = 0
        self.failed_seconds = 0.0

    def ran(self, requests: int, rows: int, seconds: float) -> None:
        """A run of so many rows, of so many requests, has ended well."""
        self.last = time.time()
        self.requests += requests
        self.rows += rows
        self.request_seconds += requests * seconds
        counted = self.runs.get(rows)
        if counted is None:
            counted = self.runs[rows] = [0, 0.0]
        counted[0] += 1
        counted[1] += seconds

    def fail(self, seconds: float) -> None:
        self.failed += 1
        self.failed_seconds += seconds
