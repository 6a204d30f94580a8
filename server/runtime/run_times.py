"""How long a run of so many rows takes, from those of late: how large a batch may be without making its rows late."""

from __future__ import annotations

SMOOTHING = 0.3
# A size that was not tried yet is thought to take so many times as long as half of it.
HOPE = 1.3


class RunTimes:
    """Smoothed seconds by the number of rows, in powers of two."""

    def __init__(self) -> None:
        self.seconds: list[float | None] = []

    def add(self, rows: int, seconds: float) -> None:
        place = (rows - 1).bit_length()
        self.seconds += [None] * (place + 1 - len(self.seconds))
        seconds *= (1 << place) / rows
        known = self.seconds[place]
        seconds = seconds if known is None else known + SMOOTHING * (seconds - known)
        self.seconds[place] = seconds
        # Others may have been measured long ago, in worse times: fewer rows take no longer, twice as many no longer
        # than two such runs.
        for other, known in enumerate(self.seconds):
            if known is not None:
                self.seconds[other] = min(known, seconds * (1 << max(0, other - place)))

    def expected(self, rows: int) -> float:
        """Of so many rows in one run; 0 as long as nothing is known."""
        found = 0.0
        for place in range((rows - 1).bit_length() + 1):
            known = self.seconds[place] if place < len(self.seconds) else None
            found = found * HOPE if known is None else known
        return found

    def largest(self, seconds: float, most: int) -> int:
        """The most rows up to `most` whose run takes no longer; at least one."""
        rows = most
        while rows > 1 and self.expected(rows) > seconds:
            rows = 1 << ((rows - 1).bit_length() - 1)
        return rows
