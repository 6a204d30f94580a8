"""Guesses at how a text goes on: what followed when its last tokens stood together the last time.

A step of one sequence waits for the weights to come from memory; some more tokens cost it little. Guessed tokens are
computed with the one that is certain, and those that turn out right need no step of their own (Leviathan et al. 2023,
with the text itself as the draft: Saxena 2023, prompt lookup). What is written is the same, token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Tokens that must have stood together; guessed at once, at most.
TOGETHER = 2
MOST = 7
# Steps without a guess after some that were all wrong.
PAUSES = (0, 0, 2, 8, 32)


@dataclass(slots=True)
class Guesses:
    """Of one sequence. length: of the next guess at most; it follows how good they are. wrong: guesses in a row that
    were all wrong. pause: steps before the next."""

    length: int = 2
    wrong: int = 0
    pause: int = 0

    def next(self, tokens: np.ndarray, most: int) -> np.ndarray:
        """What may follow int [tokens]: up to `most` of them, often none."""
        if self.pause:
            self.pause -= 1
            return tokens[:0]
        return continuation(tokens, min(self.length, most))

    def learn(self, guessed: int, right: int) -> None:
        """How many of the guessed tokens were right."""
        if right:
            self.wrong = 0
            self.length = min(2 * self.length, MOST) if right == guessed else max(right + 1, 2)
        else:
            self.length = 2
            self.pause = PAUSES[min(self.wrong, len(PAUSES) - 1)]
            self.wrong += 1


def continuation(tokens: np.ndarray, most: int) -> np.ndarray:
    """Up to `most` tokens that followed the last TOGETHER of int [tokens] the last time that they were there."""
    if most < 1 or len(tokens) <= TOGETHER:
        return tokens[:0]
    same = tokens[: len(tokens) - TOGETHER] == tokens[-TOGETHER]
    for i in range(1, TOGETHER):
        same &= tokens[i : len(tokens) - TOGETHER + i] == tokens[i - TOGETHER]
    places = np.flatnonzero(same)
    return tokens[places[-1] + TOGETHER :][:most] if len(places) else tokens[:0]
