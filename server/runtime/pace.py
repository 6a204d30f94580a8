"""How much of a prompt may be read between two steps, from how long steps and readings have taken."""

from __future__ import annotations

# Sequences that are being written wait for a reading about as long as for so many steps.
STEPS = 2.0
# No reading takes longer: what a new prompt may have to wait for.
LONGEST_SECONDS = 0.4
# Nor is a size so small that in one of twice as many tokens each would take less than such a share of the time.
WORTH = 0.9
SIZES: tuple[int, ...] = tuple(2**power for power in range(4, 12))  # tokens of a reading: 16 … 2048
FIRST = 64
# A size that was not tried yet is thought to take so many times as long as half of it.
HOPE = 1.3
SMOOTHING = 0.3
# After so many readings sizes that took too long are tried again.
PATIENCE = 64


class Pace:
    """Seconds of a step and of readings by size, smoothed. The largest size that keeps within the time is the best: the
    weights of the network are gone through once for all of its tokens."""

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.seconds: dict[int, float] = {}
        self.readings = 0

    def stepped(self, seconds: float) -> None:
        self.step_seconds += (SMOOTHING if self.step_seconds else 1.0) * (seconds - self.step_seconds)

    def read(self, tokens: int, seconds: float) -> None:
        """A reading of so many tokens, padding counted, took so long."""
        if tokens < SIZES[0]:
            return
        size = max(size for size in SIZES if size <= tokens)
        seconds *= size / tokens
        known = self.seconds.get(size, seconds)
        self.seconds[size] = known + SMOOTHING * (seconds - known)
        self.readings += 1
        if self.readings % PATIENCE == 0:
            self.seconds = {tried: known for tried, known in self.seconds.items() if tried <= size}

    def chunk(self, *, writing: int, reading: int = 1) -> int:
        """How many tokens to read at most. writing: sequences that wait for their next token meanwhile. reading: those
        that wait for their first; the more of them, the longer the others may."""
        if not self.seconds:
            return SIZES[0] if writing else FIRST
        allowed = LONGEST_SECONDS
        if writing:
            allowed = min(allowed, STEPS * self.step_seconds * max(1.0, reading / writing))
        least = min(self.seconds)
        # Proportionally to the smallest that was tried, and from there on by what is known.
        chosen, seconds = SIZES[0], self.seconds[least] * SIZES[0] / least
        for size in SIZES[1:]:
            seconds = seconds * 2 if size <= least else self.seconds.get(size, seconds * HOPE)
            if seconds > allowed:
                break
            chosen = size
        return self._worth_it(chosen)

    def _worth_it(self, chosen: int) -> int:
        """That size, or a larger one where this goes through the network's weights for too few tokens."""
        for size in SIZES[SIZES.index(chosen) : -1]:
            seconds = self.seconds.get(size)
            if seconds is None:
                return size
            double = self.seconds.get(2 * size, seconds * HOPE)
            if double > min(2 * WORTH * seconds, LONGEST_SECONDS):
                return size
        return SIZES[-1]
