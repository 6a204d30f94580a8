"""POST /v1/tokenize and /v1/detokenize: texts and the tokens that a model reads them as, in vLLM's shape."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import asgi
from litestar.types import Receive, Scope, Send

from export.processing.text import TextProcessor
from server.chats import Turn, chat_tokens
from server.errors import ApiError
from server.exchange import Exchange, cannot, decode_json, encoder, handle
from server.prompts import checked, opening, prompts
from server.rows import on_thread
from server.runtime.model import Model
from server.sampling_request import wrong


class TokenizeRequest(msgspec.Struct):
    """prompt: a text; or messages: of a chat, rendered by the model's template. add_special_tokens: those that the
    tokenizer puts around a text; usually with a prompt, and not with messages, whose template has them.
    add_generation_prompt: messages end with the beginning of an answer."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[Turn], msgspec.Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    return_token_strings: bool = False


class Tokens(msgspec.Struct):
    """max_model_len: most tokens that the model takes; of a language model, prompt and answer. token_strs: what each
    token stands for, where it is asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct):
    model: str
    tokens: list[int]


class Text(msgspec.Struct):
    """Of the tokens, special ones with it."""

    prompt: str


tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


def reads_texts(model: Model) -> TextProcessor:
    """Raises ApiError for a model that does not."""
    if model.texts is None:
        raise ApiError(400, f"{model.name} reads no texts", param="model")
    return model.texts


async def tokenize(exchange: Exchange) -> bytes:
    """Tokens as JSON."""
    request: TokenizeRequest = decode_json(await exchange.body(), tokenize_decoder)
    model = await exchange.find(request.model, None)
    return await on_thread(tokenized, request, model, reads_texts(model))


def tokenized(request: TokenizeRequest, model: Model, texts: TextProcessor) -> bytes:
    if (request.prompt is None) == (request.messages is None):
        raise wrong("prompt", "give either a prompt or messages")
    tokens: list[int]
    if request.messages is not None:
        if "chat" not in model.answers or model.language is None:
            raise ApiError(400, cannot(model, "chat"), param="messages")
        generate, special = request.add_generation_prompt, bool(request.add_special_tokens)
        tokens = chat_tokens(request.messages, model.language, generate=generate, special=special)
    else:
        [prompt] = prompts(request.prompt or "")
        assert isinstance(prompt, str), "one text was given"
        special = request.add_special_tokens is not False
        if model.language is not None and special and prompt:
            tokens = opening(prompt, texts)
        else:
            tokens = texts.whole(prompt, special=special)
    most = texts.spec.max_length if model.language is None else model.language.context
    shown = request.return_token_strs or request.return_token_strings
    strings = [texts.token(token) for token in tokens] if shown else None
    return encoder.encode(Tokens(len(tokens), most, tokens, strings))


async def detokenize(exchange: Exchange) -> bytes:
    """Text as JSON."""
    request: DetokenizeRequest = decode_json(await exchange.body(), detokenize_decoder)
    texts = reads_texts(await exchange.find(request.model, None))
    return await on_thread(detokenized, request, texts)


def detokenized(request: DetokenizeRequest, texts: TextProcessor) -> bytes:
    if request.tokens:
        checked(request.tokens, texts.tokenizer.get_vocab_size(), "tokens")
    return encoder.encode(Text(texts.decode(request.tokens, special=True)))


@asgi("/v1/tokenize", copy_scope=False)
async def tokenize_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/tokenize", scope, receive, send, tokenize)


@asgi("/v1/detokenize", copy_scope=False)
async def detokenize_route(scope: Scope, receive: Receive, send: Send) -> None:
    await handle("/v1/detokenize", scope, receive, send, detokenize)


handlers = [tokenize_route, detokenize_route]
