"""What POST /v1/chat/completions is asked, as an order for the engine of a language model."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from export.processing.chat import Message, joined, render
from export.processing.inputs import BadInput
from server.errors import ApiError
from server.generating import Asked
from server.rows import MOST_CHARACTERS
from server.runtime.language import LanguageModel
from server.sampling_request import SamplingFields, room, sampling, wrong

# OpenAI's fields of what is not offered; a value that changes nothing is taken.
NOT_OFFERED = {
    "tools": "calling tools is not offered here; leave it out",
    "tool_choice": "calling tools is not offered here; leave it out",
    "functions": "calling functions is not offered here; leave it out",
    "function_call": "calling functions is not offered here; leave it out",
    "audio": "answers are text; leave it out",
    "modalities": "answers are text; leave it out",
    "web_search_options": "searching the web is not offered here; leave it out",
}
CHANGE_NOTHING: tuple[Any, ...] = (None, [], {}, "none", ["text"])


class Part(msgspec.Struct):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Turn(msgspec.Struct):
    """A message as OpenAI has it. role: "system", "developer", "user", "assistant" or "tool", as far as the model's
    template takes it. content: a text, or a list of parts that are texts, which are put below each other."""

    role: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    content: str | list[Part] | None = None
    name: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    tool_call_id: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ChatRequest(SamplingFields, kw_only=True):
    """OpenAI's request; of our own are top_k, min_p, repetition_penalty, min_tokens, and the response_formats
    {"type": "regex", "pattern": …} and {"type": "choice", "choices": […]}. max_completion_tokens: all that the context
    leaves, unless given; max_tokens is its old name."""

    messages: Annotated[list[Turn], msgspec.Meta(min_length=1)]
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None


def order_of(request: ChatRequest, language: LanguageModel) -> Asked:
    """What the engine is asked. Raises ApiError naming the field that is wrong."""
    for field, words in NOT_OFFERED.items():
        if getattr(request, field) not in CHANGE_NOTHING:
            raise wrong(field, words)
    if request.top_logprobs and not request.logprobs:
        raise wrong("top_logprobs", "only with logprobs=true")
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    tokens = chat_tokens(request.messages, language, generate=True)
    most = room(language, len(tokens), wanted, None, field, "messages")
    others = (request.top_logprobs or 0) if request.logprobs else None
    return Asked(tokens, sampling(request, language, max_tokens=most, best_of=None, alternatives=others))


def chat_tokens(turns: list[Turn], language: LanguageModel, *, generate: bool, special: bool = False) -> list[int]:
    """A chat as the model reads it. generate: up to the beginning of an answer. special: with what the tokenizer puts
    around a text, too; templates have it in them. Raises ApiError."""
    assert language.template is not None, "only such a model is asked"
    messages = [Message(one.role, content(one, i), one.name, one.tool_call_id) for i, one in enumerate(turns)]
    if (length := sum(len(message.content) for message in messages)) > MOST_CHARACTERS:
        words = f"messages: {length:,} characters; at most {MOST_CHARACTERS:,} are read"
        raise ApiError(413, words, param="messages", code="text_too_long")
    try:
        text = render(language.template, messages, generate=generate, bos=language.bos, eos=language.eos)
    except BadInput as error:
        raise wrong("messages", str(error)) from error
    if not (tokens := language.texts.whole(text, special=special)):
        raise wrong("messages", "the model's chat template makes nothing of them")
    return tokens


def content(turn: Turn, place: int) -> str:
    where = f"messages[{place}]"
    if turn.tool_calls or turn.function_call:
        raise ApiError(400, f"{where}.tool_calls: calling tools is not offered here", param="messages")
    if turn.content is None:
        raise ApiError(400, f"{where}.content: missing; a text is expected", param="messages")
    if isinstance(turn.content, str):
        return turn.content
    for i, part in enumerate(turn.content):
        if part.type != "text" or part.text is None:
            words = f"{where}.content[{i}]: of type {part.type!r}; this server reads text, in parts of type 'text'"
            raise ApiError(400, words, param="messages")
    return joined([part.text or "" for part in turn.content])
