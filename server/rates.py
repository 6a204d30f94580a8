"""Token buckets: so many a minute, a minute's worth at once.

Of a bucket one number is kept, the moment at which it will be full again: what it holds follows from that, its rate and
the clock, and a debt is only a later moment. So several processes share all buckets through one mapped file.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from pathlib import Path
from typing import Literal

Kind = Literal["requests", "tokens"]
PLACE: dict[Kind, int] = {"requests": 0, "tokens": 1}
# Keys that can have buckets of their own. Only the pages that are used take memory.
MOST_KEYS = 2**21
BYTES = MOST_KEYS * len(PLACE) * 8
# Sums of seconds are a little off: 2.9999999 is three.
NEARLY = 1e-6


class Buckets:
    """Of all keys. Moments are seconds of a clock that all who share them go by: time.monotonic."""

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


class Bucket:
    """One of one key."""

    __slots__ = ("cell", "each", "full_at", "kind", "limit", "per_minute", "remaining", "reset")

    def __init__(self, buckets: Buckets, number: int, kind: Kind, per_minute: int) -> None:
        self.full_at, self.kind, self.per_minute = buckets.full_at, kind, per_minute
        self.cell = number % MOST_KEYS * len(PLACE) + PLACE[kind]
        self.each = 60.0 / per_minute  # seconds until there is one more
        # What headers of a response call it; OpenAI's.
        name = kind.encode()
        self.limit = (b"x-ratelimit-limit-" + name, b"%d" % per_minute)
        self.remaining, self.reset = b"x-ratelimit-remaining-" + name, b"x-ratelimit-reset-" + name

    def left(self, now: float) -> float:
        """What it holds, less than nothing where more was taken than there was."""
        return self.per_minute - max(0.0, self.full_at[self.cell] - now) / self.each

    def take(self, amount: int, now: float) -> None:
        """Be it there or not."""
        full_at = self.full_at[self.cell]
        self.full_at[self.cell] = (full_at if full_at > now else now) + amount * self.each

    def headers(self, now: float) -> tuple[tuple[bytes, bytes], ...]:
        seconds = max(0.0, self.full_at[self.cell] - now)
        left = int(self.per_minute - seconds / self.each + NEARLY)
        return self.limit, (self.remaining, b"%d" % max(0, left)), (self.reset, duration(seconds))


def duration(seconds: float) -> bytes:
    """As OpenAI writes it: 120ms, 1.5s, 6m0s."""
    if seconds < 1.0:
        return b"%dms" % math.ceil(seconds * 1e3) if seconds else b"0s"
    minutes, tenths = divmod(math.ceil(seconds * 10.0), 600)
    whole, tenth = divmod(tenths, 10)
    rest = b"%d.%ds" % (whole, tenth) if tenth else b"%ds" % whole
    return b"%dm%b" % (minutes, rest) if minutes else rest
