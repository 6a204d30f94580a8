"""What POST /v1/completions answers."""

from __future__ import annotations

from typing import Literal

import msgspec

from export.processing.text import TextProcessor
from server.growing_text import GrowingText, before
from server.runtime.decoding import Prompt
from server.runtime.search import Candidate
from server.runtime.writer import Writer


class LogProbabilities(msgspec.Struct):
    """Of the model's own distribution, whatever the temperature. text_offset: where each token's text begins."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
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


class Completion(msgspec.Struct):
    """The answer; also each event of a stream, with the piece of text that is new."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice] = []
    usage: CompletionUsage | None = None
    object: str = "text_completion"


def choice(writer: Writer, prompt: Prompt, index: int, candidate: Candidate, logprobs: int | None) -> CompletionChoice:
    """A candidate as it is answered. logprobs: how many other tokens to tell at each; None: no log-probabilities."""
    said = [writer.target.token(token) for token in candidate.tokens]
    found = CompletionChoice(
        before(writer.target.decode(candidate.tokens), prompt.options.stop),
        index,
        None if logprobs is None else log_probabilities(writer.target, candidate),
        candidate.finish_reason,
    )
    if candidate.attention is not None:
        read = [writer.source.token(token) for token in prompt.tokens]
        found.attention = AttentionMap(read, said, candidate.attention.tolist())
    return found


def log_probabilities(texts: TextProcessor, candidate: Candidate) -> LogProbabilities:
    growing, offsets = GrowingText(texts.tokenizer, ()), []
    for token in candidate.tokens:
        offsets.append(growing.given)
        growing.add(token)
    others = [{texts.token(token): share for token, share in step.items()} for step in candidate.alternatives]
    said = [texts.token(token) for token in candidate.tokens]
    return LogProbabilities(said, candidate.log_probabilities, others or None, offsets)
