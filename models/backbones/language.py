"""How the texts of a checkpoint are read and written: its tokenizer, what begins and ends a text, its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from models.backbones import gguf_file


@dataclass(frozen=True)
class Language:
    """Of a decoder. tokenizer: tokenizer.json, without truncation and padding. beginning: the token that the tokenizer
    puts before every text. ends: tokens that end one, or a turn; the first is the tokenizer's own. chat_template: in
    Jinja; None where the model has not learned to chat."""

    tokenizer: bytes
    padding: int
    beginning: int | None
    ends: tuple[int, ...]
    chat_template: str | None


def language(place: str, config: Mapping[str, Any]) -> Language:
    """Of the decoder that lies at `place`, a GGUF file, a folder or a hub id, with its config.json.

    Raises ValueError when there is no tokenizer that the tokenizers library can read, when it has more tokens than the
    model, or when nothing says how a text ends.
    """
    tokenizer = tokenizer_of(place)
    file = gguf_file.file_at(place)
    if file is not None:
        ends, template = gguf_file.ends(file), gguf_file.chat_template(file)
    else:
        loaded = _loaded(place)
        own = [loaded.eos_token_id] if isinstance(loaded.eos_token_id, int) else []
        ends, template = [*own, *_listed(config.get("eos_token_id")), *_generation_ends(place)], _template(loaded)
    vocabulary = config.get("vocab_size")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise ValueError(f"model {place!r}: its tokenizer has a token {largest}, and the model {vocabulary} tokens")
    if not ends:
        raise ValueError(
            f"model {place!r}: neither tokenizer nor config says by which token a text ends (eos_token_id)"
        )
    padding = config.get("pad_token_id")
    return Language(
        tokenizer=tokenizer.to_str().encode(),
        padding=padding if isinstance(padding, int) and padding >= 0 else ends[0],
        beginning=_beginning(tokenizer),
        ends=tuple(dict.fromkeys(ends)),
        chat_template=template,
    )


def tokenizer_of(place: str) -> Tokenizer:
    """Without truncation and padding. Raises ValueError when there is none that the tokenizers library can read."""
    path = gguf_file.file_at(place)
    file = Path(place) / "tokenizer.json"
    if path is not None:
        tokenizer = gguf_file.tokenizer(path)
    elif file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} cannot be read: {error}") from error
    else:
        loaded = _loaded(place)
        tokenizer = loaded.backend_tokenizer
        if set(tokenizer.get_vocab()) <= set(loaded.all_special_tokens):
            # transformers makes one up that knows no word when the files are missing.
            raise ValueError(f"weights {place!r}: no tokenizer beside them; add its files, tokenizer.json or vocab")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _loaded(place: str) -> PreTrainedTokenizerBase:
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, use_fast=True, trust_remote_code=False)
        loaded.backend_tokenizer  # noqa: B018 - a slow one has none
    except (OSError, ValueError, AttributeError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"weights {place!r}: no fast tokenizer: {error}") from error
    return loaded


def _beginning(tokenizer: Tokenizer) -> int | None:
    """The token before every text, as the tokenizer has it."""
    bare: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    whole: list[int] = tokenizer.encode("a").ids
    return whole[0] if whole != bare and whole[1 : 1 + len(bare)] == bare else None


def _template(loaded: PreTrainedTokenizerBase) -> str | None:
    found = loaded.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def _generation_ends(place: str) -> list[int]:
    try:
        return _listed(GenerationConfig.from_pretrained(place).eos_token_id)
    except (OSError, ValueError):
        return []


def _listed(token: object) -> list[int]:
    """Of one token id, of several, or of none."""
    return [one for one in (token if isinstance(token, list) else [token]) if isinstance(one, int)]
