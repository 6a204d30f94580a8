"""Prompts of real English: Python's own language reference, which every Python carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer

SHORTEST, LONGEST = 10, 200


@dataclass(frozen=True)
class Prompt:
    """tokens: what the text is to the network; servers get the text, loops the tokens."""

    text: str
    tokens: list[int]


class Prompts:
    """Prompts that never come again, so that nobody can reuse what it has read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        words = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
        self.tokens: list[int] = tokenizer.encode(words, add_special_tokens=False).ids
        self.place = 0

    def batches(self, streams: int, alone: int) -> list[list[Prompt]]:
        """Prompts that are sent together; for one stream `alone` times one, one after the other."""
        if streams == 1:
            return [[prompt] for prompt in self._of_lengths(alone)]
        return [list(self._of_lengths(streams))]

    def _of_lengths(self, count: int) -> Iterator[Prompt]:
        """As many, of about 10 to 200 tokens, evenly on a logarithmic scale."""
        for length in np.geomspace(SHORTEST, LONGEST, count).round().astype(int).tolist():
            text = self.tokenizer.decode(self.tokens[self.place : self.place + length]).strip()
            self.place += length
            yield Prompt(text, self.tokenizer.encode(text, add_special_tokens=False).ids)
