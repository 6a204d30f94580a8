"""The engine: everybody gets the tokens they would get alone, whatever else goes on."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.generation_metrics import Generation
from server.runtime.batcher import ClientGone, DeadlinePassed, QueueFull, RunFailed
from server.runtime.generation import Engine
from server.runtime.orders import Order
from server.runtime.sampling import Sampled, Sampler, Sampling, sample
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
        self.rows, self.tokens = self.inner.rows, self.inner.tokens
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

    def score(self, slot: int, tokens: np.ndarray, start: int) -> np.ndarray:
        self.ran("score", len(tokens))
        return self.inner.score(slot, tokens, start)

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
        return sum(tokens for kind, tokens in self.runs if kind in ("prefill", "together"))


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


def test_scored_prompts_are_read_whole_and_measured_as_what_is_written_is(path: Path, alone: Alone) -> None:
    """Whatever else is in the batch, and though rows hold their beginnings already."""

    async def story() -> None:
        random = np.random.default_rng(5)
        shared = random.integers(8, VOCABULARY, 70).tolist()
        prompts = [shared + random.integers(8, VOCABULARY, size).tolist() for size in (1, 30, 60)] + [shared[:1]]
        found = engine(Watched(path))
        plain = [order(prompt, seed=i, temperature=1.0) for i, prompt in enumerate([*prompts, shared[:9]])]
        asked = [replace(order(prompt, alternatives=2, n=2, best_of=2), scores=[]) for prompt in prompts]
        tickets = [found.submit(one) for one in [plain[0], *asked, *plain[1:]]]
        answers = [await ticket.future for ticket in tickets]
        for one, candidates in zip([plain[0], *asked, *plain[1:]], answers, strict=True):
            same(candidates, await alone(replace(one, scores=None)))
        slots = Watched(path).inner
        for one in asked:
            assert one.scores is not None
            assert [score.token for score in one.scores] == list(one.tokens[1:])
            logits = slots.score(0, one.tokens, 0).astype(np.float64)
            shares = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            for place, score in enumerate(one.scores):
                assert score.log_probability == pytest.approx(shares[place, score.token], abs=1e-3)
                assert list(score.alternatives) == np.argsort(-shares[place], kind="stable")[:2].tolist()
        free(found)

    run(story)


def one_by_one(slots: GraphSlots, wanted: Order) -> list[int]:
    """The answer to an order, a step a token."""
    sampler = Sampler(wanted.sampling, place=0, prompt=wanted.tokens, ends=frozenset({END}))
    logits, tokens = slots.prefill(0, wanted.tokens, 0, logits=True), list[int]()
    while logits is not None:
        [sampled] = sample([sampler], logits[None])
        if sampled.token == END:
            break
        tokens.append(sampled.token)
        if len(tokens) == wanted.sampling.max_tokens:
            break
        place = len(wanted.tokens) + len(tokens)
        logits = slots.decode(np.array(tokens[-1:]), np.array([place], np.int32))[0]
    return tokens


def test_guesses_save_runs_and_change_nothing(path: Path) -> None:
    """Alone, whether or not a text says again what it has said."""

    async def story() -> None:
        model, reference, saved = Watched(path), Watched(path).inner, 0
        found = engine(model)
        for seed in range(24):
            random = np.random.default_rng(seed)
            said = random.integers(8, VOCABULARY, 6).tolist()
            prompt = said * int(random.integers(1, 4)) + said[: int(random.integers(1, 5))]
            likely = dict.fromkeys(said[: seed % 4], 9.0)
            wanted = order(
                prompt,
                int(random.integers(1, 60)),
                seed=seed,
                temperature=float(random.choice([0.0, 0.3, 1.0])),
                top_p=float(random.choice([1.0, 0.9])),
                frequency_penalty=float(random.choice([0.0, 0.4])),
                logit_bias=likely,
                min_tokens=int(random.integers(0, 2)),
            )
            runs = len(model.runs)
            [answer] = await found.submit(wanted).future
            assert answer.tokens == one_by_one(reference, wanted)
            saved += len(answer.tokens) - (len(model.runs) - runs)
        assert saved > 100
        assert any(kind == "decode" for kind, _ in model.runs)
        free(found)

    run(story)


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


def test_an_order_alone_is_answered_as_it_came(path: Path) -> None:
    async def story() -> None:
        heard: list[tuple[int, int]] = []
        done: list[tuple[int, Candidate]] = []
        lone = engine(Watched(path))
        wanted = order([1, 2, 3], 9, heard=lambda i, one: heard.append((i, one.token)), done=lambda *e: done.append(e))
        [found] = await lone.submit(wanted).future
        assert heard == [(0, token) for token in found.tokens]
        assert done == [(0, found)]
        assert found.finish_reason == "length"
        assert len(found.tokens) == 9
        assert found.log_probability == pytest.approx(sum(found.log_probabilities))
        assert found.score == pytest.approx(found.log_probability / 9)
        assert found.alternatives == []
        await lone.drain()
        free(lone)

    run(story)


def test_several_answers_read_their_prompt_once_even_in_waves(path: Path) -> None:
    async def story() -> None:
        prompt = list(range(30))
        for slots, size in ((6, 6), (6, 20), (2, 7)):
            model = Watched(path, slots=slots)
            wanted = order(prompt, 6, n=3, best_of=size, temperature=1.0, seed=3)
            found = await engine(model).submit(wanted).future
            assert model.computed == 30
            wide = await engine(Watched(path, slots=size)).submit(wanted).future
            same(found, wide)
            assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)

    run(story)


def test_what_a_prompt_begins_with_is_not_computed_again(path: Path, alone: Alone) -> None:
    async def story() -> None:
        model = Watched(path)
        kept = engine(model)
        system = list(range(40))
        for tail in ([1, 2, 3], [4, 5], [1, 2, 3, 9]):
            wanted = order([*system, *tail], 5)
            same(await kept.submit(wanted).future, await alone(wanted))
        assert model.computed == 43 + 2 + 1
        # A conversation that goes on: all but the last token of the answer is there.
        first = [5] * 30
        [answer] = await kept.submit(order(first, 6)).future
        before = model.computed
        wanted = order([*first, *answer.tokens, 8, 8], 5)
        same(await kept.submit(wanted).future, await alone(wanted))
        assert model.computed - before == 3
        # And the same prompt again costs one token.
        before = model.computed
        await kept.submit(wanted).future
        assert model.computed - before == 1

    run(story)


def test_the_prefix_of_a_running_sequence_is_shared(path: Path, alone: Alone) -> None:
    async def story() -> None:
        model = Watched(path)
        shared = engine(model)
        first = order(list(range(50)), 100)
        running = shared.submit(first)
        while not any(kind == "decode" for kind, _ in model.runs):
            await asyncio.sleep(0.001)
        before = model.computed
        second = order([*range(50), 3], 5)
        same(await shared.submit(second).future, await alone(second))
        assert model.computed - before == 1
        same(await running.future, await alone(first))

    run(story)


def test_the_least_recently_used_row_is_overwritten_first(path: Path) -> None:
    async def story() -> None:
        model = Watched(path, slots=3)
        kept = engine(model)
        prompts = {name: [10 + number] * 40 for number, name in enumerate("abcdefg")}
        for name in "abcdefg":  # one more than there are rows
            await kept.submit(order(prompts[name], 3)).future
        costs = {}
        for name in "ba":
            before = model.computed
            await kept.submit(order(prompts[name], 3)).future
            costs[name] = model.computed - before
        assert costs == {"b": 1, "a": 40}

    run(story)


def test_new_short_prompts_are_read_together(path: Path, alone: Alone) -> None:
    async def story() -> None:
        model = Watched(path)
        crowd = engine(model)
        crowd.pace.chunk = lambda **_: 100  # type: ignore[method-assign]
        model.gate.clear()
        orders = [order([i, *range(i + 5)], 6) for i in range(6)]
        tickets = [crowd.submit(wanted) for wanted in orders]
        model.gate.set()
        for ticket, wanted in zip(tickets, orders, strict=True):
            same(await ticket.future, await alone(wanted))
        assert any(kind == "together" for kind, _ in model.runs)
        assert sum(kind != "decode" for kind, _ in model.runs) <= 3

    run(story)


def test_a_long_prompt_never_stops_those_who_write(path: Path) -> None:
    """Between two tokens of a stream at most one piece of a prompt is read, and pieces are small."""

    async def story() -> None:
        model = Watched(path, slots=4)
        busy = engine(model)
        writers = [busy.submit(order([i], 150, logit_bias={END: -100.0})) for i in range(2)]
        while model.runs.count(("decode", 2)) < 3:
            await asyncio.sleep(0.001)
        before = len(model.runs)
        reader = busy.submit(order(list(range(50)) * 3, 1))
        await reader.future
        kinds = [kind for kind, _ in model.runs[before:]]
        assert all(pair != ("prefill", "prefill") for pair in itertools.pairwise(kinds))
        for ticket in writers:
            [found] = await ticket.future
            assert len(found.tokens) == 150

    run(story)


def test_short_prompts_pass_a_long_one_that_is_being_read_and_it_goes_on(path: Path) -> None:
    async def story() -> None:
        model = Watched(path, slots=4)
        busy = engine(model)
        busy.pace.chunk = lambda **_: 16  # type: ignore[method-assign]
        order_of_ends: list[str] = []

        async def one(name: str, tokens: list[int]) -> None:
            await busy.submit(order(tokens, 1)).future
            order_of_ends.append(name)

        model.gate.clear()
        tasks = [asyncio.ensure_future(one("long", list(range(45)) * 4))]
        await asyncio.sleep(0.02)
        tasks += [asyncio.ensure_future(one(f"short{i}", [50 + i] * 20)) for i in range(9)]
        await asyncio.sleep(0.02)
        model.gate.set()
        await asyncio.gather(*tasks)
        assert order_of_ends.index("long") >= 3
        assert order_of_ends.index("long") < 9

    run(story)


def test_a_seed_gives_the_same_whatever_else_is_drawn(path: Path) -> None:
    async def story() -> None:
        wanted = order([3, 2, 1], 15, temperature=1.3, seed=11, n=2, best_of=2)
        found = [await engine(Watched(path)).submit(wanted).future]
        busy = engine(Watched(path))
        others = [busy.submit(order([i, i + 1], 30, temperature=1.0)) for i in range(3)]
        found.append(await busy.submit(wanted).future)
        await asyncio.gather(*(ticket.future for ticket in others))
        same(*found)

    run(story)


def test_stop_texts_end_tokens_and_least_lengths(path: Path) -> None:
    async def story() -> None:
        one = engine(Watched(path))
        [plain] = await one.submit(order([9, 9, 2], 20, logit_bias={END: -100.0})).future
        letters = text(plain.tokens)
        stop = letters[4:7]  # across tokens
        [stopped] = await one.submit(order([9, 9, 2], 20, logit_bias={END: -100.0}, stop=("zzz", stop))).future
        assert stopped.finish_reason == "stop"
        assert stop in text(stopped.tokens)
        assert stop not in text(stopped.tokens[:-1])
        assert plain.tokens[: len(stopped.tokens)] == stopped.tokens
        [later] = await one.submit(order([9, 9, 2], 20, logit_bias={END: 100.0}, min_tokens=4)).future
        assert (len(later.tokens), later.finish_reason) == (4, "stop")
        [ended] = await one.submit(order([9, 9, 2], 20, logit_bias={END: 100.0})).future
        assert (ended.tokens, ended.log_probabilities, ended.finish_reason) == ([], [], "stop")
        assert ended.log_probability < 0

    run(story)


def test_alternatives_are_noted_for_those_who_want_them(path: Path) -> None:
    async def story() -> None:
        one = engine(Watched(path))
        [found] = await one.submit(order([1, 2], 5, alternatives=3)).future
        assert [len(step) for step in found.alternatives] == [3] * len(found.tokens)
        for token, log_probability, step in zip(found.tokens, found.log_probabilities, found.alternatives, strict=True):
            assert step[token] == pytest.approx(log_probability)

    run(story)


@pytest.mark.parametrize("slots", [3, 16])
def test_500_orders_that_start_and_are_dropped_at_random(path: Path, alone: Alone, slots: int) -> None:
    """Every slot comes back, nobody gets another's tokens, and nothing grows."""

    async def story() -> None:
        chance = random.Random(slots)
        model = Watched(path, slots=slots)
        busy = engine(model)
        addresses = [buffer.ctypes.data for buffer in model.inner.memory.buffers]  # type: ignore[attr-defined]
        kept = [order([i] * (1 + 7 * i), 8) for i in range(5)]
        expected = [await alone(wanted) for wanted in kept]

        async def one(i: int) -> None:
            await asyncio.sleep(chance.random() * 2)
            which = i % len(kept)
            heard: list[int] = []
            wanted = replace(
                kept[which], deadline=time.perf_counter() + LATER, heard=lambda _, s: heard.append(s.token)
            )
            ticket = busy.submit(wanted)
            if chance.random() < 0.7:
                await asyncio.sleep(chance.random() * 0.05)
                ticket.future.cancel()
                known = expected[which][0].tokens
                assert heard == known[: len(heard)]
                heard.clear()
                await asyncio.sleep(0.01)
                assert heard == []  # nothing is told to those who have gone
            else:
                same(await ticket.future, expected[which])
                assert heard == expected[which][0].tokens

        await asyncio.gather(*(one(i) for i in range(500)))
        await busy.drain()
        free(busy)
        assert addresses == [buffer.ctypes.data for buffer in model.inner.memory.buffers]  # type: ignore[attr-defined]
        assert len(model.inner.steps) <= slots
        assert busy.held.tokens.shape == (2 * slots, CONTEXT)
        assert not any((busy.reading, busy.waiting, busy.inbox))

    run(story)


def test_deadlines_for_the_beginning_and_for_the_end(path: Path) -> None:
    async def story() -> None:
        model = Watched(path, slots=1)
        busy = engine(model)
        model.gate.clear()
        first = busy.submit(order([1], 30, logit_bias={END: -100.0}))
        while busy.depth():
            await asyncio.sleep(0.001)
        late = busy.submit(order([2], seconds=0.02))
        unfinished = busy.submit(order([3], 150, until=time.perf_counter() + 0.02))
        patient = busy.submit(order([4], 2))
        await asyncio.sleep(0.05)
        model.gate.set()
        for ticket in (late, unfinished):
            with pytest.raises(DeadlinePassed):
                await ticket.future
        assert len((await first.future)[0].tokens) == 30
        await patient.future
        # One that has begun in time and goes on for too long.
        slow = busy.submit(order([5], 150, seconds=0.01, until=time.perf_counter() + 0.05, logit_bias={END: -100.0}))
        model.fails = lambda kind: bool(time.sleep(0.005))
        with pytest.raises(DeadlinePassed):
            await slow.future
        await busy.drain()
        free(busy)

    run(story)


def test_a_full_queue_refuses_and_says_when_to_come_back(path: Path) -> None:
    async def story() -> None:
        model = Watched(path, slots=1)
        busy = engine(model, queue_limit=2)
        model.gate.clear()
        first = busy.submit(order([1], 3))
        while busy.depth():
            await asyncio.sleep(0.001)
        kept = [busy.submit(order([i], 3)) for i in (2, 3)]
        with pytest.raises(QueueFull) as refused:
            busy.submit(order([4], 3))
        assert refused.value.retry_after >= 1
        model.gate.set()
        await asyncio.gather(first.future, *(ticket.future for ticket in kept))

    run(story)


def test_an_order_that_can_never_be_carried_out_is_refused(path: Path) -> None:
    async def story() -> None:
        small = engine(Watched(path, tokens=100))
        assert small.context == 100
        await small.submit(order([1] * 90, 10)).future
        for wanted in (order([1] * 90, 11), order([], 3), order([1], 0), order([1], 2, n=3, best_of=2)):
            with pytest.raises(ValueError, match=r"needs a prompt|are above 100"):
                small.submit(wanted)

    run(story)


def test_memory_that_is_reserved_is_waited_for(path: Path, alone: Alone) -> None:
    async def story() -> None:
        model = Watched(path, slots=6, tokens=200)
        small = engine(model)
        most = 0
        orders = [order([i] * 40, 20, logit_bias={END: -100.0}) for i in range(7)]
        tickets = [small.submit(wanted) for wanted in orders]
        while small.open:
            most = max(most, small.occupancy().running)
            assert int(small.held.taken.sum()) <= 200 + 60
            await asyncio.sleep(0)
        assert most == 3  # of 60 places each
        for ticket, wanted in zip(tickets, orders, strict=True):
            same(await ticket.future, await alone(wanted))

    run(story)


def test_a_client_that_has_gone_gives_its_slots_back(path: Path) -> None:
    async def story() -> None:
        model = Watched(path, slots=2)
        model.fails = lambda kind: bool(time.sleep(0.005))
        busy = engine(model)
        away = busy.submit(order([1], 180, gone=lambda: True, n=2, best_of=2, temperature=1.0))
        waits = busy.submit(order([2], 180, gone=lambda: True))
        with pytest.raises(ClientGone):
            await away.future
        with pytest.raises(ClientGone):
            await waits.future
        await busy.drain()
        free(busy)
        assert len(model.runs) < 150

    run(story)


@pytest.mark.parametrize("kind", ["prefill", "together", "decode"])
def test_a_failing_run_fails_its_sequences_and_the_engine_goes_on(path: Path, alone: Alone, kind: str) -> None:
    async def story() -> None:
        model = Watched(path, slots=4)
        metrics = Generation().of("model", "1")
        busy = engine(model, metrics=metrics)
        model.gate.clear()
        model.fails = lambda ran: ran == kind and len(model.runs) < 8
        busy.pace.chunk = lambda **_: 16  # type: ignore[method-assign]
        lengths = (3, 4, 4, 60)
        tickets = [busy.submit(order([i] * size, 10, logit_bias={END: -1.0})) for i, size in enumerate(lengths)]
        model.gate.set()
        found = await asyncio.gather(*(ticket.future for ticket in tickets), return_exceptions=True)
        failed = [one for one in found if isinstance(one, RunFailed)]
        assert failed
        assert all(str(one) == "broken" for one in failed)
        model.fails = lambda ran: False
        for wanted in (order([1] * 9, 10), order([0] * 3, 10)):
            same(await busy.submit(wanted).future, await alone(wanted))
        await busy.drain()
        free(busy)
        assert metrics.finished_sequences["error"] == len(failed)

    run(story)


def test_a_guess_that_cannot_be_checked_fails_its_sequence_and_the_engine_goes_on(path: Path, alone: Alone) -> None:
    async def story() -> None:
        model = Watched(path)
        found = engine(model)
        model.fails = lambda ran: ran == "score"
        wanted = order([9, 8] * 8, 30, logit_bias={8: 50.0})
        with pytest.raises(RunFailed, match="broken"):
            await found.submit(wanted).future
        model.fails = lambda ran: False
        same(await found.submit(wanted).future, await alone(wanted))
        free(found)

    run(story)


def test_a_sampler_that_fails_takes_no_more_than_its_step_with_it(path: Path, alone: Alone) -> None:
    async def story() -> None:
        busy = engine(Watched(path, slots=1))
        bad, good = busy.submit(order([1], 20, logit_bias={10**6: 1.0})), order([2], 20)
        other = busy.submit(good)
        with pytest.raises(RunFailed):
            await bad.future
        same(await other.future, await alone(good))
        await busy.drain()
        free(busy)

    run(story)


def test_rows_whose_prompts_wait_cost_the_others_nothing(path: Path) -> None:
    """A sequence that is written is behind none whose prompt has not begun to be read."""

    async def story() -> None:
        model = Watched(path, slots=6)
        busy = engine(model)
        busy.pace.chunk = lambda *, writing, reading: 16  # type: ignore[method-assign]
        model.gate.clear()
        tickets = [busy.submit(order([i] * 60, 40, logit_bias={END: -100.0})) for i in range(5)]
        tickets.append(busy.submit(order([9, 8, 7], 40, logit_bias={END: -100.0})))
        model.gate.set()
        await asyncio.gather(*(ticket.future for ticket in tickets))
        widths = [rows for kind, rows in model.runs if kind == "decode"]
        assert widths[0] == 2

    run(story)


def test_a_listener_that_fails_ends_its_own_order(path: Path, alone: Alone) -> None:
    async def story() -> None:
        def broken(number: int, sampled: Sampled) -> None:
            raise KeyError("mine")

        busy = engine(Watched(path))
        bad, good = busy.submit(order([1], 20, heard=broken)), order([2], 20)
        other = busy.submit(good)
        with pytest.raises(KeyError):
            await bad.future
        same(await other.future, await alone(good))
        await busy.drain()
        free(busy)

    run(story)


def test_drain_waits_for_everything_and_close_for_nothing(path: Path) -> None:
    async def story() -> None:
        model = Watched(path, slots=2)
        busy = engine(model)
        tickets = [busy.submit(order([i], 20)) for i in range(6)]
        await busy.drain()
        assert all(ticket.future.done() for ticket in tickets)
        free(busy)
        model.gate.clear()
        tickets = [busy.submit(order([i], 20)) for i in range(6)]
        busy.close()
        for ticket in tickets:
            with pytest.raises(RunFailed):
                await ticket.future
        with pytest.raises(RunFailed):
            busy.submit(order([1], 2))
        model.gate.set()
        await busy.drain()

    run(story)


def test_its_thread_ends_when_there_is_nothing_to_do_and_its_memory_goes_with_its_owner(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.runtime.generation.LINGER_SECONDS", 0.01)

    async def story() -> None:
        model = Watched(path)
        found = engine(model)
        for _ in range(3):
            await found.submit(order([1, 2], 3)).future
            while found.thread is not None:
                await asyncio.sleep(0.002)
        gone = weakref.ref(model.inner)
        del model, found
        await asyncio.sleep(0.02)
        gc.collect()
        assert gone() is None

    run(story)


def test_what_is_measured_adds_up(path: Path) -> None:
    async def story() -> None:
        metrics = Generation().of("model", "1")
        found = engine(Watched(path, slots=3), metrics=metrics)
        prompts = [[*range(30), i] for i in range(5)]
        answers = [await found.submit(order(prompt, 6, logit_bias={END: -100.0})).future for prompt in prompts]
        cancelled = found.submit(order([1], 150, logit_bias={END: -100.0}))
        cancelled.future.cancel()
        await found.submit(order([2, 3], 4, n=2, best_of=2, temperature=1.0, logit_bias={END: -100.0})).future
        await found.drain()
        assert sum(len(one.tokens) for [one] in answers) == 30
        assert metrics.finished_sequences == {"stop": 0, "length": 7, "abort": 1, "error": 0}
        assert metrics.prefix_hits == 4 * 30 + 2
        assert metrics.prompt_tokens >= 5 * 31 + 2 * 2
        assert sum(metrics.first_token.counts) in (7, 8)
        assert metrics.occupancy is not None
        assert metrics.occupancy().running == metrics.occupancy().waiting == 0

    run(story)
