"""What POST /v1/completions is asked, as prompts for the decoder."""

from __future__ import annotations

from typing import Annotated

import msgspec

from export.processing.inputs import BadInput
from server.errors import ApiError
from server.rows import MOST_CHARACTERS
from server.runtime.decoding import Prompt
from server.runtime.search import Options
from server.runtime.writer import Writer

# OpenAI's default.
MAX_TOKENS = 16
# Of OpenAI's fields; a value that changes nothing is taken.
NOT_OFFERED = ("echo", "suffix", "presence_penalty", "frequency_penalty", "logit_bias")
NOT_STREAMED = ("n", "best_of", "beams")

Sequences = Annotated[int, msgspec.Meta(ge=1, le=16)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class CompletionRequest(msgspec.Struct):
    """OpenAI's request. Of our own are `beams` (above 1: beam search), `length_penalty` (α of Wu et al., 2016) and
    `attention` (how a translation's tokens attended to those of its source).

    prompt: a text, a list of texts, token ids, or a list of those. temperature: 0 unless given for a translation,
    1 for a language model. max_tokens: 16 unless given for a language model; as long as it may be for a translation.
    """

    model: str
    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] | None = None
    n: Sequences | None = None
    best_of: Sequences | None = None
    beams: Sequences | None = None
    length_penalty: Annotated[float, msgspec.Meta(ge=0.0, le=5.0)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], msgspec.Meta(max_length=4)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    attention: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    suffix: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None


def prompts_of(request: CompletionRequest, name: str, writer: Writer) -> list[Prompt]:
    """What the decoder of the model of this name is asked. Raises ApiError naming the field that is wrong."""
    refuse_what_is_not_offered(request, name, writer)
    found = prompt_rows(request.prompt, writer)
    return [Prompt(row, options(request, name, writer, len(row))) for row in found]


def refuse_what_is_not_offered(request: CompletionRequest, name: str, writer: Writer) -> None:
    """Raises ApiError for fields that cannot be, or not together."""
    for field in NOT_OFFERED:
        if getattr(request, field):
            raise wrong(field, "not offered here; leave it out")
    beams, best_of, n = request.beams or 1, request.best_of, request.n or 1
    if beams > 1 and request.temperature:
        raise wrong("beams", "a beam search draws nothing; leave temperature at 0")
    if beams > 1 and best_of is not None:
        raise wrong("best_of", "a beam search answers the best of its beams; give one of the two")
    if n > (most := beams if beams > 1 else best_of or n):
        raise wrong("n", f"{n} answers of {most}; n is at most best_of, or beams")
    if request.attention and not writer.decoder.attends:
        raise wrong("attention", f"{name} has none to show")
    if request.stream:
        for field in NOT_STREAMED:
            if (getattr(request, field) or 1) > 1:
                raise wrong(field, "one sequence a prompt can be sent while it is made; leave stream out")
        if request.logprobs is not None or request.attention:
            raise wrong("attention" if request.attention else "logprobs", "not part of a stream; leave stream out")
    elif request.stream_options is not None:
        raise wrong("stream_options", "only with stream=true")


def prompt_rows(prompt: str | list[str | int | list[int]], writer: Writer) -> list[list[int]]:
    """Tokens of each prompt. Raises ApiError."""
    items = [prompt] if isinstance(prompt, str) else prompt
    texts = [item for item in items if isinstance(item, str)]
    ids = [item for item in items if isinstance(item, int)]
    rows = [item for item in items if isinstance(item, list)]
    if not items or len(items) not in (len(texts), len(ids), len(rows)):
        raise wrong("prompt", "a text, a list of texts, token ids or a list of lists of token ids")
    return text_rows(texts, writer) if texts else token_rows(rows or [ids], writer)


def text_rows(texts: list[str], writer: Writer) -> list[list[int]]:
    for i, text in enumerate(texts):
        if len(text) > MOST_CHARACTERS:
            message = f"prompt {i} has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read"
            raise ApiError(413, message, param="prompt", code="text_too_long")
    try:
        return writer.source.openings(texts) if writer.goes_on else writer.source.encode(texts, cut=False)
    except BadInput as error:
        raise wrong("prompt", str(error)) from error


def token_rows(rows: list[list[int]], writer: Writer) -> list[list[int]]:
    """An unknown id would break the run of everybody in the batch."""
    known, most = writer.source.tokenizer.get_vocab_size(), writer.source.spec.max_length
    for row in rows:
        if not 0 < len(row) <= most:
            raise wrong("prompt", f"{len(row)} token ids; 1 to {most} are taken")
        if min(row) < 0 or max(row) >= known:
            raise wrong("prompt", f"token ids run from 0 to {known - 1}")
    return rows


def options(request: CompletionRequest, name: str, writer: Writer, length: int) -> Options:
    """Of a prompt of so many tokens. Raises ApiError where they leave no room for what is asked."""
    most = writer.target.spec.max_length
    room = most - length if writer.goes_on else most
    if room < 1:
        raise too_long("prompt", f"{length} tokens; {name} reads and writes {most} together")
    wanted = request.max_tokens or (min(MAX_TOKENS, room) if writer.goes_on else room)
    if wanted > room:
        raise too_long("max_tokens", f"{wanted}; {name} writes at most {room}" + " after this prompt" * writer.goes_on)
    beams, n = request.beams or 1, request.n or 1
    usual = 1.0 if writer.goes_on and beams == 1 else 0.0
    stops = request.stop or ()
    return Options(
        max_tokens=wanted,
        n=n,
        best_of=1 if beams > 1 else request.best_of or n,
        temperature=usual if request.temperature is None else request.temperature,
        top_p=request.top_p or 1.0,
        beams=beams,
        length_penalty=Options.length_penalty if request.length_penalty is None else request.length_penalty,
        seed=request.seed,
        stop=(stops,) if isinstance(stops, str) else tuple(stops),
        alternatives=request.logprobs or 0,
        attention=bool(request.attention),
    )


def wrong(field: str, words: str) -> ApiError:
    return ApiError(400, f"{field}: {words}", param=field)


def too_long(field: str, words: str) -> ApiError:
    return ApiError(400, f"{field}: {words}", param=field, code="context_length_exceeded")
