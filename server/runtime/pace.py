"""How much of a prompt may be read between two steps, from how long steps and readings have taken."""

from __future__ import annotations

# Sequences that are being written wait for a reading about as long as for so many steps.
STEPS = 1.5
# With nobody writing: what a new prompt may have to wait for.
LONGEST_SECONDS = 0.4
SIZES = tuple(2**power for power in range(4, 12))  # tokens of a reading: 16 … 2048
# Until more is known.
SECONDS_A_TOKEN = 1e-3
SMOOTHING = 0.3


class Pace:
    """Seconds of a step and of readings by size, smoothed. The largest size that keeps within the time is the best: the
    weights of the network are gone through once for all of its tokens."""

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.seconds: dict[int, float] = {}

    def stepped(self, seconds: float) -> None:
        self.step_seconds += (SMOOTHING if self.step_seconds else 1.0) * (seconds - self.step_seconds)

    def read(self, tokens: int, seconds: float) -> None:
        """A reading of so many tokens, padding counted, took so long."""
        size = max((size for size in SIZES if size <= tokens), default=SIZES[0])
        seconds *= size / max(size, tokens)
        known = self.seconds.get(size, seconds)
        self.seconds[size] = known + SMOOTHING * (seconds - known)

    def chunk(self, *, writing: bool) -> int:
        """How many tokens to read at most. writing: whether sequences wait for their next token meanwhile."""
        allowed = STEPS * self.step_seconds if writing else LONGEST_SECONDS
        chosen: int = SIZES[0]
        smaller = self.seconds.get(SIZES[0], SIZES[0] * SECONDS_A_TOKEN)
        for size in SIZES[1:]:
            # Twice as many tokens take twice as long at most: a size that was once slow gets another chance.
            smaller = min(self.seconds.get(size, 2 * smaller), 2 * smaller)
            if smaller > allowed:
                break
            chosen = size
        return chosen
