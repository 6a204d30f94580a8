"""What an engine is asked: an order, the sequences that are written for it, and the ticket that it is answered by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from server.generation_metrics import Times
from server.runtime.guesses import Guesses
from server.runtime.sampling import Sampled, Sampler, Sampling
from server.runtime.search import Candidate


@dataclass(frozen=True)
class Order:
    """A prompt, and what is wanted of it. Times are on time.perf_counter's clock.

    deadline: it is dropped if it has not begun by then. until: it is dropped if it is not done by then. gone: whether
    nobody waits any more; asked now and then. heard: told every token that goes into an answer, with the number of the
    sequence, 0 … best_of - 1. done: told every sequence when it is finished. These three are called on the event loop.
    arrived: when the request came; None: now. scores: filled, before anything is told, with each token of the prompt
    but the first, measured as `sampling` has what is drawn measured; None: they are not wanted.
    """

    tokens: Sequence[int]
    sampling: Sampling
    deadline: float
    until: float | None = None
    gone: Callable[[], bool] | None = None
    heard: Callable[[int, Sampled], None] | None = None
    done: Callable[[int, Candidate], None] | None = None
    arrived: float | None = None
    scores: list[Sampled] | None = None

    @property
    def unscored(self) -> bool:
        """Whether its prompt has to be computed for its own sake."""
        return self.scores is not None and len(self.scores) < len(self.tokens) - 1


@dataclass(eq=False, slots=True)
class Stream:
    """One sequence of an order. row: where it is, -1 before it begins and when it has left. reading: its prompt is not
    all computed yet."""

    ticket: Ticket
    number: int
    times: Times
    row: int = -1
    reading: bool = True
    ended: bool = False
    sampler: Sampler | None = None
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    alternatives: list[dict[int, float]] = field(default_factory=list)
    log_probability: float = 0.0
    guesses: Guesses = field(default_factory=Guesses)


class Ticket:
    """An order that was taken. `future` gives the candidates, the best first, or raises DeadlinePassed, ClientGone,
    RunFailed, or BadInput for a grammar that can be followed no further; cancelling it gives its slots back."""

    __slots__ = ("candidates", "future", "let_in", "logits", "order", "over", "prompt", "streams")

    def __init__(self, future: asyncio.Future[list[Candidate]], order: Order) -> None:
        self.future, self.order = future, order
        self.prompt = np.array(order.tokens, np.int32)
        arrived = time.perf_counter() if order.arrived is None else order.arrived
        self.streams = [Stream(self, i, Times(arrived, len(self.prompt))) for i in range(order.sampling.best_of)]
        self.candidates: list[Candidate] = []
        # The rest is the engine's thread's. let_in: streams that got a slot. logits: of what follows the prompt, while
        # streams have yet to begin with it.
        self.let_in = 0
        self.logits: np.ndarray | None = None
        self.over = False

    @property
    def tokens(self) -> int:
        """Read and written so far."""
        begun = any(stream.times.scheduled for stream in self.streams)
        return begun * len(self.prompt) + sum(stream.times.generated_tokens for stream in self.streams)

    @property
    def places(self) -> int:
        """That a sequence takes at most."""
        return len(self.prompt) + self.order.sampling.max_tokens
