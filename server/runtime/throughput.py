"""How much is done a second, of late: what a queue can promise.

By Little's law whoever joins a queue waits for what is ahead of them divided by the throughput. So no fixed length is
right for a queue: it holds what can be done within the time that its requests have, and that follows the model, the
machine and whatever else runs there. Of a server that has little to do one cannot tell how much it could: measure while
more waits.
"""

from __future__ import annotations

import math

# Seconds after which what was measured counts for a third.
MEMORY = 1.0


class Throughput:
    """Units a second, by sums that fade. Before anything was measured it is infinite: nobody is refused on a guess."""

    __slots__ = ("seconds", "units")

    def __init__(self) -> None:
        self.units = self.seconds = 0.0

    def add(self, units: float, seconds: float) -> None:
        """So many were done in the last `seconds`."""
        fading = math.exp(-seconds / MEMORY)
        self.units = self.units * fading + units
        self.seconds = self.seconds * fading + seconds

    def rate(self, since: float = 0.0) -> float:
        """since: seconds that have gone by since, with nothing done: of what has come to a halt it falls."""
        return self.units / (self.seconds + since) if self.seconds > 0.0 else math.inf
