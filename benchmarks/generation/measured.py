"""What one contender did with some prompts, whoever measured it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Answer:
    """One sequence. Seconds from when its prompt was sent to its first token, and to its last. text: what it says."""

    first: float
    last: float
    text: str


@dataclass
class Measured:
    """Of one round at one number of streams. seconds: from the first prompt sent to the last token, of batches that
    come one after the other the sum. tokens: generated for each prompt."""

    tokens: int
    seconds: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second, of all streams together."""
        return len(self.answers) * self.tokens / self.seconds

    def first_tokens(self) -> list[float]:
        return [answer.first for answer in self.answers]

    def per_token(self) -> list[float]:
        """Mean seconds between the tokens of each answer."""
        return [(answer.last - answer.first) / (self.tokens - 1) for answer in self.answers]


def milliseconds(seconds: Sequence[float], percentile: float) -> float:
    return 1e3 * float(np.percentile(seconds, percentile))
