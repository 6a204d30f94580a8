"""Grammars in the engine: what is written under one fits, and whoever writes beside it notices nothing."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import jsonschema_rs
import pytest

from export.processing.inputs import BadInput
from finetune.vocabulary import EOS
from server.runtime.generation import Engine
from server.runtime.orders import Order
from server.runtime.sampling import Sampling
from server.runtime.slots import GraphSlots
from server.settings import Settings
from tests.server.runtime.test_grammar import SCHEMAS, VOCABULARY, grammars, tiny, tokenizer
from tests.server.slot_graphs import write_slot_graph

CONTEXT = 256


@pytest.fixture(scope="module")
def slots(tmp_path_factory: pytest.TempPathFactory) -> GraphSlots:
    path = write_slot_graph(tmp_path_factory.mktemp("slots") / "model.onnx", vocabulary=VOCABULARY)
    settings = Settings(home=Path(), providers=["CPUExecutionProvider"], generation_slots=6, generation_context=CONTEXT)
    return GraphSlots(path, settings, context=CONTEXT)


def text(tokens: list[int]) -> str:
    return str(tokenizer(tiny()).decode(tokens))


def engine(slots: GraphSlots) -> Engine:
    return Engine(slots, ends=frozenset({EOS}), text=text, queue_limit=100)


def order(sampling: Sampling) -> Order:
    return Order([9, 8, 7, 6], sampling, time.perf_counter() + 60)


def test_answers_fit_their_grammars_and_the_others_are_what_they_are_alone(slots: GraphSlots) -> None:
    grammar, plain = grammars().json_schema(SCHEMAS["record"]), Sampling(max_tokens=40, seed=5, min_tokens=40)
    validator = jsonschema_rs.validator_for(SCHEMAS["record"])

    async def story() -> None:
        busy = engine(slots)
        [alone] = await busy.submit(order(plain)).future
        fitting = Sampling(max_tokens=200, temperature=1.5, n=3, best_of=3, seed=1, grammar=grammar)
        matching = Sampling(max_tokens=200, temperature=0.0, grammar=grammars().regex("[a-z]{3}-[0-9]{2}"))
        found, [matched], [other] = await asyncio.gather(
            *(busy.submit(order(sampling)).future for sampling in (fitting, matching, plain))
        )
        assert other.tokens == alone.tokens
        assert re.fullmatch("[a-z]{3}-[0-9]{2}", text(matched.tokens))
        assert (matched.finish_reason, len(found)) == ("stop", 3)
        for candidate in found:
            assert candidate.finish_reason == "stop"
            validator.validate(json.loads(text(candidate.tokens)))
        assert len({tuple(candidate.tokens) for candidate in found}) == 3

    asyncio.run(asyncio.wait_for(story(), 50))


def test_a_grammar_that_becomes_too_large_fails_its_own_order_only(slots: GraphSlots) -> None:
    shapes = [{"type": "object", "properties": {f"p{i}": {}, "q": {}}} for i in range(300)]
    grammar = grammars().json_schema({"anyOf": shapes})

    async def story() -> None:
        busy = engine(slots)
        # Behind this token all 300 shapes are possible, which is too much, and an end is all that would be left.
        brace = tokenizer(tiny()).token_to_id("{")
        wish = Sampling(max_tokens=100, n=2, best_of=2, temperature=0.5, logit_bias={brace: 100.0}, grammar=grammar)
        broken = busy.submit(order(wish)).future
        [other] = await busy.submit(order(Sampling(max_tokens=30, min_tokens=30))).future
        with pytest.raises(BadInput, match="the grammar cannot be followed"):
            await broken
        assert len(other.tokens) == 30
        await busy.drain()
        assert busy.occupancy().running == 0

    asyncio.run(asyncio.wait_for(story(), 50))
