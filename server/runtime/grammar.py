"""What an answer has to be: JSON that fits a schema, any JSON object, a text that a regular expression matches, or one
of several texts. llguidance says which tokens may follow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from export.processing.inputs import BadInput

# Compiled grammars that a model keeps.
KEPT = 128
# Between the parts of JSON: nothing, a space, or a new line and its indentation. Without a bound, models write spaces
# until they are stopped.
WHITESPACE = r" |\n[ \t]{0,32}"


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether the answer fits and nothing may follow but an end."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def failure(self) -> BadInput | None:
        """Why the grammar can be followed no further, where it cannot: it is too large for its next step."""
        if not self._matcher.is_error():
            return None
        return BadInput(f"the grammar cannot be followed: {reason(self._matcher)}")

    def allowed(self, vocabulary: int) -> np.ndarray:
        """The tokens that may come next, bool [vocabulary]: at least one. Ends are among them where the answer may
        end, and nothing else is after a failure."""
        allowed: np.ndarray = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[:vocabulary] != 0
        return allowed

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar. Any number of answers may follow it, in any threads."""

    beginning: LLMatcher

    def matcher(self) -> Matcher:
        return Matcher(self.beginning.deep_copy())


class Grammars:
    """Grammars over the tokens of one model; threads may share it. Every method compiles, which may take a moment, or
    finds what it has compiled before, and raises BadInput for what cannot be followed, saying why."""

    def __init__(self, tokenizer: bytes, vocabulary: int, ends: Sequence[int]) -> None:
        """tokenizer: the tokenizer.json. vocabulary: logits of a token. ends: tokens that end an answer."""
        self.tokenizer = LLTokenizer(tokenizer.decode(), n_vocab=vocabulary, eos_token=list(ends))
        self._compiled = lru_cache(KEPT)(self._compile)

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE}
            )
        except (ValueError, RecursionError) as error:
            raise BadInput(f"the schema cannot be followed: {error}") from error
        return self._compiled("schema", grammar)

    def json_object(self) -> Grammar:
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """pattern: in the syntax of Rust's regex crate, matched from the first character to the last."""
        return self._compiled("regular expression", LLMatcher.grammar_from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> Grammar:
        """One of the texts."""
        if not texts:
            raise BadInput("the choice has no texts to choose from")
        return self._compiled("choice", LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts))))

    def _compile(self, kind: str, grammar: str) -> Grammar:
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        # Its first step, too, which is the slowest and which the copies then know, and once more: what the one leaves
        # behind may be too large for the other. Found out here, it keeps nobody waiting for a token.
        for first in (matcher, matcher.deep_copy()):
            if not first.is_error():
                first.compute_logit_bias()
            if first.is_error():
                raise BadInput(f"the {kind} cannot be followed: {reason(first)}")
        return Grammar(matcher)


def reason(matcher: LLMatcher) -> str:
    """What llguidance says of a failure, without the state of its parser."""
    text: str = matcher.get_error().split("<state>")[0]
    return " ".join(text.split())
