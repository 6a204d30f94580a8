"""What POST /v1/completions is asked: of a language model, orders for its engine; of a translation, prompts for its
decoder."""

from __future__ import annotations

from typing import Annotated

import msgspec

from export.processing.inputs import BadInput
from export.processing.text import TextProcessor
from server.errors import ApiError
from server.generating import Asked
from server.rows import MOST_CHARACTERS
from server.runtime.decoding import Prompt
from server.runtime.language import LanguageModel
from server.runtime.search import Options
from server.runtime.writer import Writer
from server.sampling_request import SamplingFields, Sequences, room, sampling, stops, wrong

# OpenAI's default.
MAX_TOKENS = 16
# What a translation does not do; a value that changes nothing is taken.
NOT_TRANSLATED = (
    "echo",
    "suffix",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "response_format",
)
NOT_STREAMED = ("n", "best_of", "beams")
# What a language model does not do.
NOT_CONTINUED = {
    "beams": "beams are searched for translations; leave it out",
    "length_penalty": "it is for beams, which translations have; leave it out",
    "attention": "translations show theirs, this model has none to show",
    "suffix": "not offered here, as text is only written behind a prompt; leave it out",
}


class CompletionRequest(SamplingFields, kw_only=True):
    """OpenAI's request. Of our own are for a language model also top_k, min_p, repetition_penalty, min_tokens and
    response_format, and for a translation `beams` (above 1: beam search), `length_penalty` (α of Wu et al., 2016) and
    `attention` (how its tokens attended to those of its source).

    prompt: a text, a list of texts, token ids, or a list of those. temperature: 0 unless given for a translation,
    1 for a language model. max_tokens: 16 unless given for a language model; as long as it may be for a translation.
    """

    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    best_of: Sequences | None = None
    beams: Sequences | None = None
    length_penalty: Annotated[float, msgspec.Meta(ge=0.0, le=5.0)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    attention: bool | None = None
    echo: bool | None = None
    suffix: str | None = None


def orders_of(request: CompletionRequest, language: LanguageModel) -> list[Asked]:
    """What the engine of a language model is asked. Raises ApiError naming the field that is wrong."""
    for field, words in NOT_CONTINUED.items():
        if getattr(request, field) and (field != "beams" or request.beams != 1):
            raise wrong(field, words)
    texts = language.texts
    found: list[Asked] = []
    # Prompts of the same length share what is asked of them, with its grammar.
    by_room = {}
    for prompt in prompts(request.prompt):
        tokens = opening(prompt, texts) if isinstance(prompt, str) else checked(prompt, language.vocabulary)
        most = room(language, len(tokens), request.max_tokens, MAX_TOKENS, "max_tokens", "prompt")
        if most not in by_room:
            by_room[most] = sampling(
                request, language, max_tokens=most, best_of=request.best_of, alternatives=request.logprobs
            )
        echo = ""
        if request.echo:
            echo = prompt if isinstance(prompt, str) else texts.decode(tokens)
        scored = request.echo and request.logprobs is not None
        found.append(Asked(tokens, by_room[most], echo, [] if scored else None))
    return found


def opening(text: str, texts: TextProcessor) -> list[int]:
    """Tokens that a language model goes on from. Raises ApiError where there are none."""
    first = [] if texts.spec.bos_token_id is None else [texts.spec.bos_token_id]
    if not (found := first + texts.whole(text, special=False)):
        raise wrong("prompt", "empty, and this model has no token for the beginning of a text")
    return found


def checked(ids: list[int], vocabulary: int, field: str = "prompt") -> list[int]:
    """An unknown id would break the run of everybody in the batch."""
    if not ids:
        raise wrong(field, "no token ids; at least 1 is taken")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise wrong(field, f"token ids run from 0 to {vocabulary - 1}")
    return ids


def prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One or more texts or lists of ids. Raises ApiError."""
    items = [prompt] if isinstance(prompt, str) else prompt
    ids = [item for item in items if isinstance(item, int)]
    found = [item for item in items if not isinstance(item, int)]
    if ids and not found:
        return [ids]
    if not items or ids or len({type(item) for item in items}) > 1:
        raise wrong("prompt", "a text, a list of texts, token ids or a list of lists of token ids")
    for i, item in enumerate(found):
        if isinstance(item, str) and len(item) > MOST_CHARACTERS:
            message = f"prompt {i} has {len(item):,} characters; at most {MOST_CHARACTERS:,} are read"
            raise ApiError(413, message, param="prompt", code="text_too_long")
    return found


def sources_of(request: CompletionRequest, name: str, writer: Writer) -> list[Prompt]:
    """What the decoder of the translation of this name is asked. Raises ApiError naming the field that is wrong."""
    refuse_what_is_not_offered(request, name, writer)
    found = prompts(request.prompt)
    texts = [prompt for prompt in found if isinstance(prompt, str)]
    try:
        rows = writer.source.encode(texts, cut=False) if texts else [read(ids, writer) for ids in found]
    except BadInput as error:
        raise wrong("prompt", str(error)) from error
    asked = options(request, name, writer)
    return [Prompt(row, asked) for row in rows]


def read(ids: str | list[int], writer: Writer) -> list[int]:
    assert not isinstance(ids, str), "texts are encoded together"
    if len(ids) > (most := writer.source.spec.max_length):
        raise wrong("prompt", f"{len(ids)} token ids; 1 to {most} are taken")
    return checked(ids, writer.source.tokenizer.get_vocab_size())


def refuse_what_is_not_offered(request: CompletionRequest, name: str, writer: Writer) -> None:
    """Raises ApiError for fields that cannot be, or not together."""
    for field in NOT_TRANSLATED:
        if getattr(request, field):
            raise wrong(field, "not offered of a translation; leave it out")
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
                raise wrong(field, "one translation a prompt can be sent while it is made; leave stream out")
        if request.logprobs is not None or request.attention:
            raise wrong("attention" if request.attention else "logprobs", "not part of a stream; leave stream out")
    elif request.stream_options is not None:
        raise wrong("stream_options", "only with stream=true")


def options(request: CompletionRequest, name: str, writer: Writer) -> Options:
    most = writer.target.spec.max_length
    if (wanted := request.max_tokens or most) > most:
        words = f"max_tokens: {wanted}; {name} writes at most {most}"
        raise ApiError(400, words, param="max_tokens", code="context_length_exceeded")
    beams, n = request.beams or 1, request.n or 1
    return Options(
        max_tokens=wanted,
        n=n,
        best_of=1 if beams > 1 else request.best_of or n,
        temperature=request.temperature or 0.0,
        top_p=request.top_p or 1.0,
        beams=beams,
        length_penalty=Options.length_penalty if request.length_penalty is None else request.length_penalty,
        seed=request.seed,
        stop=stops(request),
        alternatives=request.logprobs or 0,
        attention=bool(request.attention),
    )
