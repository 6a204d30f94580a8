"""How completions and chats say what they want sampled, and what the engine is asked then."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from export.processing.inputs import BadInput
from server.errors import ApiError
from server.runtime.grammar import Grammar
from server.runtime.language import LanguageModel
from server.runtime.sampling import Sampling

# Below it nothing but the likeliest token would be drawn, and float32 would come to its end.
COLDEST = 1e-5

Sequences = Annotated[int, msgspec.Meta(ge=1, le=16)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
Bias = Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)]


class TextFormat(msgspec.Struct, tag="text", tag_field="type"):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, tag="json_object", tag_field="type"):
    """Any JSON object."""


class JsonSchema(msgspec.Struct):
    """`strict` changes nothing: what is answered fits the schema in any case."""

    schema: dict[str, Any]
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, tag="json_schema", tag_field="type"):
    json_schema: JsonSchema


class RegexFormat(msgspec.Struct, tag="regex", tag_field="type"):
    """Of our own: the whole answer matches the pattern, in the syntax of Rust's regex crate."""

    pattern: Annotated[str, msgspec.Meta(min_length=1, max_length=10_000)]


class ChoiceFormat(msgspec.Struct, tag="choice", tag_field="type"):
    """Of our own: the answer is one of these texts."""

    choices: Annotated[list[Annotated[str, msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1, max_length=1_000)]


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class SamplingFields(msgspec.Struct, kw_only=True):
    """What completions and chats have in common. Of our own are top_k, min_p, repetition_penalty and min_tokens, which
    mean what they mean to vLLM. temperature: 1 unless given. seed: the same one draws the same tokens."""

    model: str
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    n: Sequences | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], msgspec.Meta(max_length=4)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=10.0)] | None = None
    logit_bias: Annotated[dict[str, Bias], msgspec.Meta(max_length=300)] | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


def sampling(
    request: SamplingFields, language: LanguageModel, *, max_tokens: int, best_of: int | None, alternatives: int | None
) -> Sampling:
    """What the engine is asked for each prompt of a request. Compiles its grammar, so not for the event loop. Raises
    ApiError naming the field that is wrong."""
    n = request.n or 1
    if n > (most := best_of or n):
        raise wrong("n", f"{n} answers of {most}; n is at most best_of")
    if request.stream and (best_of or n) > n:
        raise wrong("best_of", "answers are compared when they are whole, so more than n cannot be streamed")
    if request.stream_options is not None and not request.stream:
        raise wrong("stream_options", "only with stream=true")
    if (min_tokens := request.min_tokens or 0) > max_tokens:
        raise wrong("min_tokens", f"{min_tokens} tokens of at most {max_tokens}")
    return Sampling(
        max_tokens=max_tokens,
        n=n,
        best_of=best_of or n,
        temperature=temperature(request),
        top_k=max(request.top_k or 0, 0),
        top_p=request.top_p or 1.0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=biases(request.logit_bias or {}, language.vocabulary),
        seed=request.seed,
        stop=stops(request),
        alternatives=alternatives,
        min_tokens=min_tokens,
        grammar=grammar(request.response_format, language),
    )


def stops(request: SamplingFields) -> tuple[str, ...]:
    found = request.stop or ()
    return (found,) if isinstance(found, str) else tuple(found)


def temperature(request: SamplingFields) -> float:
    if request.temperature is None:
        return 1.0
    return request.temperature if request.temperature >= COLDEST else 0.0


def biases(asked: dict[str, float], vocabulary: int) -> dict[int, float]:
    found = {}
    for token, bias in asked.items():
        if not token.isascii() or not token.isdecimal() or not int(token[:10]) < vocabulary:
            raise wrong("logit_bias", f"{token[:20]!r} is no token; token ids run from 0 to {vocabulary - 1}")
        found[int(token)] = bias
    return found


def grammar(asked: ResponseFormat | None, language: LanguageModel) -> Grammar | None:
    if asked is None or isinstance(asked, TextFormat):
        return None
    if (grammars := language.grammars) is None:
        raise wrong("response_format", "this model's tokens are whole words, which no grammar can be followed with")
    try:
        match asked:
            case JsonObjectFormat():
                return grammars.json_object()
            case JsonSchemaFormat(json_schema=found):
                return grammars.json_schema(found.schema)
            case RegexFormat(pattern=pattern):
                return grammars.regex(pattern)
            case ChoiceFormat(choices=choices):
                return grammars.choice(choices)
    except BadInput as error:
        raise wrong("response_format", str(error)) from error


def room(
    language: LanguageModel, prompt_tokens: int, wanted: int | None, usual: int | None, field: str, source: str
) -> int:
    """How many tokens may be answered to a prompt of so many. wanted: by the field of this name; usual: without it, as
    far as there is room; None: all of it. source: the field that the prompt is in. Raises ApiError where prompt and
    answer are more than the context."""
    most = language.context - prompt_tokens
    if most < (wanted or 1):
        asked = f" and {wanted} for the answer in {field}" if wanted else " and none is left for the answer"
        words = f"this model's context is {language.context} tokens; you asked for {prompt_tokens} in {source}{asked}"
        where = source if most < 1 else field
        raise ApiError(400, f"{where}: {words}", param=where, code="context_length_exceeded")
    return wanted or (most if usual is None else min(usual, most))


def wrong(field: str, words: str) -> ApiError:
    return ApiError(400, f"{field}: {words}", param=field)
