"""What POST /v1/chat/completions answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from export.processing.text import TextProcessor
from server.completion import CompletionUsage
from server.generating import Told, told
from server.growing_text import before
from server.runtime.search import Candidate


class ChatToken(msgspec.Struct):
    """A token; `bytes`: of its UTF-8, a character's may come with several tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenAndOthers(ChatToken):
    """top_logprobs: the likeliest tokens in its place, best first."""

    top_logprobs: list[ChatToken]


class ChatLogProbabilities(msgspec.Struct):
    """Of the model's own distribution, whatever the temperature."""

    content: list[ChatTokenAndOthers]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    """finish_reason: "stop" at the end of the answer or a stop text, "length" at max_completion_tokens."""

    index: int
    message: ChatMessage
    logprobs: ChatLogProbabilities | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer; and, as object "chat.completion.chunk" with `delta` for `message`, each event of a stream."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    usage: CompletionUsage | msgspec.UnsetType = msgspec.UNSET
    choices: list[ChatChoice] = []


def choice(
    texts: TextProcessor, candidate: Candidate, index: int, stops: Sequence[str], *, logprobs: bool
) -> ChatChoice:
    noted = chat_log_probabilities(texts, told(texts, candidate, 0)) if logprobs else None
    text = before(texts.decode(candidate.tokens), stops)
    return ChatChoice(index, ChatMessage(text), noted, candidate.finish_reason)


def chat_log_probabilities(texts: TextProcessor, tokens: Sequence[Told]) -> ChatLogProbabilities:
    def shown(token: int, share: float) -> ChatToken:
        return ChatToken(texts.token(token), share, list(texts.token_bytes(token)))

    return ChatLogProbabilities(
        [
            ChatTokenAndOthers(
                texts.token(one.token),
                one.log_probability,
                list(texts.token_bytes(one.token)),
                [shown(*other) for other in one.alternatives.items()],
            )
            for one in tokens
        ]
    )
