"""What POST /v1/completions answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from export.processing.text import TextProcessor
from server.generating import Asked, Told, told, told_prompt
from server.growing_text import before
from server.runtime.decoding import Prompt
from server.runtime.search import Candidate
from server.runtime.writer import Writer


class LogProbabilities(msgspec.Struct):
    """Of the model's own distribution, whatever the temperature. top_logprobs: the likeliest tokens, and the one that
    was taken. None of both for the first token of a prompt, which follows nothing. text_offset: where each token's text
    begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class AttentionMap(msgspec.Struct):
    """weights[i][j]: of source token j, when target token i was chosen."""

    source: list[str]
    target: list[str]
    weights: list[list[float]]


class CompletionChoice(msgspec.Struct):
    """`index` counts through the prompts' answers, n for each prompt. finish_reason: "stop" at the end of the sequence
    or a stop text, "length" at max_tokens."""

    text: str
    index: int
    logprobs: LogProbabilities | None = None
    finish_reason: Literal["stop", "length"] | None = None
    attention: AttentionMap | msgspec.UnsetType = msgspec.UNSET


class CompletionUsage(msgspec.Struct):
    """`completion_tokens`: of the answers that are returned."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(msgspec.Struct, kw_only=True):
    """The answer; also each event of a stream, with the piece of text that is new."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    usage: CompletionUsage | msgspec.UnsetType = msgspec.UNSET
    choices: list[CompletionChoice] = []


def continuation(
    texts: TextProcessor, candidate: Candidate, index: int, asked: Asked, logprobs: int | None
) -> CompletionChoice:
    """An answer of a language model. logprobs: how many other tokens to tell at each; None: no log-probabilities."""
    tokens = told_prompt(texts, asked) + told(texts, candidate, len(asked.echo))
    found = answered(texts, candidate, index, asked.sampling.stop, None)
    found.logprobs = None if logprobs is None else log_probabilities(texts, tokens, logprobs)
    found.text = asked.echo + found.text
    return found


def answered(
    texts: TextProcessor, candidate: Candidate, index: int, stops: Sequence[str], logprobs: int | None
) -> CompletionChoice:
    """What was written, alone."""
    noted = None if logprobs is None else log_probabilities(texts, told(texts, candidate, 0), logprobs)
    return CompletionChoice(before(texts.decode(candidate.tokens), stops), index, noted, candidate.finish_reason)


def translation(
    writer: Writer, prompt: Prompt, index: int, candidate: Candidate, logprobs: int | None
) -> CompletionChoice:
    found = answered(writer.target, candidate, index, prompt.options.stop, logprobs)
    if candidate.attention is not None:
        read = [writer.source.token(token) for token in prompt.tokens]
        said = [writer.target.token(token) for token in candidate.tokens]
        found.attention = AttentionMap(read, said, candidate.attention.tolist())
    return found


def log_probabilities(texts: TextProcessor, tokens: Sequence[Told], others: int) -> LogProbabilities:
    """others: how many tokens were noted at each."""
    top = [
        {texts.token(token): share for token, share in [*one.alternatives.items(), (one.token, one.log_probability)]}
        if not math.isnan(one.log_probability)
        else None
        for one in tokens
    ]
    return LogProbabilities(
        [texts.token(one.token) for one in tokens],
        [None if math.isnan(one.log_probability) else one.log_probability for one in tokens],
        top if others else None,
        [one.offset for one in tokens],
    )


def usage(read: int, written: int) -> CompletionUsage:
    return CompletionUsage(read, written, read + written)
