"""The engine: everybody gets the tokens they would get alone, whatever else goes on."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.runtime.generation import Engine, Order
from server.runtime.sampling import Sampling
from server.runtime.search import Candidate
from server.runtime.slots import GraphSlots
from server.settings import Settings
from tests.server.slot_graphs import write_slot_graph

VOCABULARY, CONTEXT, END = 61, 192, 7
LATER = 3600.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slot_graph(tmp_path_factory.mktemp("slots") / "model.onnx", vocabulary=VOCABULARY)


class Watched:
    """A slot model that notes its runs, checks what it is asked, and can be held or made to fail."""

    def __init__(self, path: Path, slots: int = 6, tokens: int = 0) -> None:
        settings = Settings(
            providers=["CPUExecutionProvider"],
            intra_op_threads=1,
            generation_slots=slots,
            generation_context=CONTEXT,
            generation_tokens=tokens,
        )
        self.inner = GraphSlots(path, settings, context=CONTEXT)
        self.slots, self.context, self.vocabulary = self.inner.slots, self.inner.context, self.inner.vocabulary
        self.tokens = self.inner.tokens
        self.runs: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails: Callable[[str], bool] = lambda kind: False
        self.places = 0  # that have memory, at most

    def ran(self, kind: str, tokens: int) -> None:
        assert self.gate.wait(20)
        self.runs.append((kind, tokens))
        if self.fails(kind):
            raise RuntimeError("broken")

    def prefill(self, slot: int, tokens: np.ndarray, start: int, *, logits: bool) -> np.ndarray | None:
        self.ran("prefill", len(tokens))
        assert start + len(tokens) < self.context
        return self.inner.prefill(slot, tokens, start, logits=logits)

    def prefill_together(self, first: int, prompts: Sequence[np.ndarray]) -> np.ndarray:
        self.ran("together", len(prompts) * max(map(len, prompts)))
        return self.inner.prefill_together(first, prompts)

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.ran("decode", len(tokens))
        assert lengths.max() <= self.context
        return self.inner.decode(tokens, lengths)

    def copy(self, source: int, target: int, length: int) -> None:
        self.inner.copy(source, target, length)

    def release(self, slot: int, kept: int) -> None:
        self.inner.release(slot, kept)

    @property
    def computed(self) -> int:
        """Tokens of prompts."""
        return sum(tokens for kind, tokens in self.runs if kind != "decode")


def text(tokens: Sequence[int]) -> str:
    """Every token is a letter, or two."""
    return "".join(chr(97 + token) if token < 26 else chr(97 + token % 26) + chr(97 + token // 26) for token in tokens)


def engine(model: Any, queue_limit: int = 1000, **options: Any) -> Engine:
    return Engine(model, ends=frozenset({END}), text=text, queue_limit=queue_limit, **options)


def order(tokens: Sequence[int], max_tokens: int = 12, **options: Any) -> Order:
    fields = {name: options.pop(name) for name in ("until", "gone", "heard", "done") if name in options}
    seconds = options.pop("seconds", LATER)
    sampling = Sampling(max_tokens=max_tokens, **{"temperature": 0.0, **options})
    return Order(list(tokens), sampling, time.perf_counter() + seconds, **fields)


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(story(), 50)

    asyncio.run(limited())


class Alone:
    """What an order is answered with nothing else running, in an engine and slots of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[Candidate]] = {}

    async def __call__(self, wanted: Order) -> list[Candidate]:
        plain = replace(wanted, deadline=0.0, until=None, gone=None, heard=None, done=None)
        if repr(plain) not in self.known:
            lone = engine(Watched(self.path, slots=wanted.sampling.best_of))
            again = replace(plain, deadline=time.perf_counter() + LATER)
            self.known[repr(plain)] = await lone.submit(again).future
        return self.known[repr(plain)]


@pytest.fixture(scope="module")
def alone(path: Path) -> Alone:
    return Alone(path)


def same(found: Sequence[Candidate], expected: Sequence[Candidate]) -> None:
    """The best first; those whose scores differ by rounding only may have changed places."""
    key = lambda candidate: (round(candidate.score, 4), candidate.tokens)  # noqa: E731
    for one, other in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
        assert one.tokens == other.tokens
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-3)


def free(found: Engine) -> None:
    """Nothing is in a slot and nothing waits."""
    assert found.occupancy().running == found.occupancy().waiting == found.depth() == len(found.open) == 0


def test_greedy_tokens_are_those_of_the_graph_token_by_token(path: Path) -> None:
    async def story() -> None:
        slots, prompt = Watched(path).inner, [3, 1, 4, 1, 5]
        expected: list[int] = []
        while len(expected) < 12:
            logits = slots.prefill(0, [*prompt, *expected], 0, logits=True)
            assert logits is not None
            if int(logits.argmax()) == END:
                break
            expected.append(int(logits.argmax()))
        [found] = await engine(Watched(path)).submit(order(prompt)).future
        assert found.tokens == expected
        assert len(found.log_probabilities) == len(expected)

    run(story)


@pytest.mark.parametrize("seed", range(12))
def test_a_busy_batch_changes_nobodys_tokens(path: Path, alone: Alone, seed: int) -> None:
    """Joins, leaves, forks, shared prefixes, small memory and cancellations at random."""

    async def story() -> None:
        chance = random.Random(seed)
        systems = [[chance.randrange(VOCABULARY) for _ in range(size)] for size in (20, 50, 90)]
        model = Watched(path, slots=chance.choice([1, 2, 5, 8]), tokens=chance.choice([0, 200, 400]))
        busy = engine(model)

        async def one() -> None:
            await asyncio.sleep(chance.random() * 0.1)
            system = chance.choice([*systems, [], []])
            prompt = system + [chance.randrange(VOCABULARY) for _ in range(chance.choice([1, 3, 10, 30]))]
            best_of = chance.choice([1, 1, 1, 2, 4])
            wanted = order(
                prompt,
                chance.choice([1, 5, 20]),
                best_of=best_of,
                n=chance.randint(1, best_of),
                temperature=0.0 if best_of == 1 else 0.9,
                seed=chance.randrange(5),
                stop=chance.choice([(), (), ("ab", "q"), ("xc",)]),
            )
            ticket = busy.submit(wanted)
            if chance.random() < 0.25:
                await asyncio.sleep(chance.random() * 0.05)
                ticket.future.cancel()
                return
            same(await ticket.future, await alone(wanted))

        await asyncio.gather(*(one() for _ in range(30)))
        await busy.drain()
        free(busy)

    run(story)
