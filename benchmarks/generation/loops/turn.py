"""How the benchmark talks to a loop in a process of its own: a line of JSON in, a line out. Standard library only, for
the environments of peers."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Batch:
    """One batch as it is generated. first, last: of each prompt, on time.perf_counter. tokens: of each."""

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def step(self, tokens: Sequence[int]) -> None:
        """Every sequence got one token, just now."""
        now = time.perf_counter()
        if not self.tokens:
            self.first, self.tokens = [now] * len(tokens), [[] for _ in tokens]
        self.last = [now] * len(tokens)
        for row, token in zip(self.tokens, tokens, strict=True):
            row.append(token)


# Prompts and the number of tokens to generate for each, whatever they are.
Generate = Callable[[list[list[int]], int], Batch]


def serve(settings: str, generate: Generate) -> None:
    """Answer {"prompts", "tokens"} with {"first", "last", "tokens"}, seconds from when the line had been read, until
    the input ends. settings: words about how this loop is set up, told first."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps({"settings": settings}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        batch = generate(asked["prompts"], asked["tokens"])
        first, last = ([when - start for when in times] for times in (batch.first, batch.last))
        print(json.dumps({"first": first, "last": last, "tokens": batch.tokens}), file=answers)
