"""What the rows of a slot model hold: tokens whose keys and values are there, to be found again by later prompts.

A row that nobody uses any more keeps what it held until it is needed; the least recently used goes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from server.runtime.slots import SlotModel

# Fewer tokens than these are sooner computed than looked after.
LEAST_SHARED = 16


class HeldTokens:
    """tokens: int32 [rows, context], of which the first `filled` of a row, int32 [rows], are in the model's memory.

    used: when a row was last needed, in turns. taken: places of a row that have memory. Both int64 [rows]."""

    def __init__(self, model: SlotModel) -> None:
        self.model = model
        self.tokens = np.zeros((model.rows, model.context), np.int32)
        self.filled = np.zeros(model.rows, np.int32)
        self.used = np.zeros(model.rows, np.int64)
        self.taken = np.zeros(model.rows, np.int64)
        self.turn = 0

    def shared(self, prompt: np.ndarray) -> np.ndarray:
        """How many tokens at the front of the prompt, int32 [tokens], each row holds: int64 [rows]."""
        longest = min(len(prompt), int(self.filled.max()))
        differs = self.tokens[:, :longest] != prompt[:longest]
        same = np.where(differs.any(axis=1), differs.argmax(axis=1), longest) if longest else np.zeros(len(self.filled))
        return np.minimum(same, self.filled).astype(np.int64)

    def touch(self, row: int) -> None:
        """The row is needed now."""
        self.turn += 1
        self.used[row] = self.turn

    def write(self, row: int, tokens: Sequence[int] | np.ndarray) -> None:
        """The model has computed these, behind what the row holds."""
        start = int(self.filled[row])
        end = start + len(tokens)
        self.tokens[row, start:end] = tokens
        self.filled[row] = end
        self.taken[row] = max(self.taken[row], end)

    def step(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """The model has computed one token more in each of these rows, int64 [rows]; tokens: int64 [rows]."""
        places = self.filled[rows]
        self.tokens[rows, places] = tokens
        self.filled[rows] = places + 1
        self.taken[rows] = np.maximum(self.taken[rows], places + 1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Row `target` holds the first `length` tokens of row `source`, and nothing else."""
        self.model.copy(source, target, length)
        self.tokens[target, :length] = self.tokens[source, :length]
        self.filled[target] = length
        self.taken[target] = max(self.taken[target], length)
        self.used[target] = self.used[source]

    def forget(self, row: int) -> None:
        """What the row holds is worth nothing."""
        self.filled[row] = self.used[row] = 0

    def release(self, row: int, kept: int) -> None:
        """Give back the memory of places from `kept` on."""
        if self.taken[row] > kept:
            self.model.release(row, kept)
            self.taken[row] = kept
            self.filled[row] = min(self.filled[row], kept)

    def oldest(self, first: int, but: int = -1) -> int:
        """Of rows first, first + 1, … the least recently used, `but` one."""
        used = self.used[first:].copy()
        if but >= first and len(used) > 1:
            used[but - first] = self.turn + 1
        return first + int(used.argmin())
