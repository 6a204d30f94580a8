"""Token buckets: so many a minute, a minute's worth at once.

Of a bucket one number is kept, the moment at which it will be full again: what it holds follows from that, its rate and
the clock, and a debt is only a later moment. So several processes share all buckets through one mapped file.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import Literal

Kind = Literal["requests", "tokens"]
PLACE: dict[Kind, int] = {"requests": 0, "tokens": 1}
# Keys that can have buckets of their own. Only the pages that are used take memory.
MOST_KEYS = 2**21
BYTES = MOST_KEYS * len(PLACE) * 8


class Buckets:
    """Of all keys, two each. `now` is seconds of a clock that all who share them go by: time.monotonic."""

    def __init__(self, shared: Path | None = None) -> None:
        """shared: a file that other processes have mapped, too; made where it is not there."""
        self.file = -1
        if shared is not None:
            self.file = os.open(shared, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self.file, BYTES)
        self.full_at = memoryview(mmap.mmap(self.file, BYTES)).cast("d")

    def lock(self, number: int) -> None:
        """Keep other processes from the buckets of this key, until `unlock`. One thread of a process uses them."""
        if self.file >= 0:
            fcntl.lockf(self.file, fcntl.LOCK_EX, 1, number % MOST_KEYS)

    def unlock(self, number: int) -> None:
        if self.file >= 0:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, number % MOST_KEYS)

    def seconds_to_full(self, number: int, kind: Kind, now: float) -> float:
        return max(0.0, self.full_at[number % MOST_KEYS * 2 + PLACE[kind]] - now)

    def left(self, number: int, kind: Kind, per_minute: int, now: float) -> float:
        """What the bucket holds, less than nothing where more was taken than there was."""
        return per_minute - self.seconds_to_full(number, kind, now) * per_minute / 60.0

    def take(self, number: int, kind: Kind, per_minute: int, amount: int, now: float) -> None:
        """Take it, be it there or not."""
        cell = number % MOST_KEYS * 2 + PLACE[kind]
        self.full_at[cell] = max(self.full_at[cell], now) + amount * 60.0 / per_minute
