"""How often a version of a model has run, on how many rows, and how long: what the statistics extension asks for."""

from __future__ import annotations

import time
from collections import defaultdict


class Runs:
    """last: when one ended last, in seconds since the epoch; 0.0 before the first. rows, requests: that were in them.
    request_seconds: the time of its run added up over the requests. by_rows: how many runs of so many rows, and their
    seconds. cached: what the cache of answers did, "hits" and "misses", where there is one. Not for threads: one alone
    counts."""

    __slots__ = ("by_rows", "cached", "last", "request_seconds", "requests", "rows")

    def __init__(self) -> None:
        self.last = 0.0
        self.rows = self.requests = 0
        self.request_seconds = 0.0
        self.cached: defaultdict[str, int] = defaultdict(int)
        self.by_rows: dict[int, tuple[int, float]] = {}

    def add(self, requests: int, rows: int, seconds: float) -> None:
        self.last = time.time()
        self.rows += rows
        self.requests += requests
        self.request_seconds += requests * seconds
        count, total = self.by_rows.get(rows, (0, 0.0))
        self.by_rows[rows] = (count + 1, total + seconds)
