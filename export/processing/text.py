"""Texts to token ids and padded batches. Training and serving both tokenize through TextProcessor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from export.processing.inputs import BadInput, TextInput

PADDING_MULTIPLE = 8


class TextProcessor:
    """A tokenizer with its limits; threads may share it."""

    def __init__(self, spec: TextInput, tokenizer_json: bytes) -> None:
        """tokenizer_json: the file of the tokenizers library. Raises ValueError when it cannot be read."""
        self.spec = spec
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{spec.tokenizer} cannot be read: {error}") from error
        self.added = self.tokenizer.get_added_tokens_decoder()
        self.decoders = set(_decoders(json.loads(tokenizer_json).get("decoder")))
        self.known_bytes: dict[int, bytes] = {}
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(spec.max_length)

    def encode(self, texts: Sequence[str], *, cut: bool = True) -> list[list[int]]:
        """Ids of each text with the special tokens, at most max_length. Raises BadInput for an empty text, and where
        nothing is to be cut, for one that is longer."""
        return [ids for ids, _ in self.encode_marked(texts, cut=cut)]

    def encode_marked(self, texts: Sequence[str], *, cut: bool = True) -> list[tuple[list[int], bool]]:
        """As `encode`, and whether each was cut."""
        for i, text in enumerate(texts):
            if not text.strip():
                raise BadInput(f"{_which(texts, i)} is empty")
        return self._ids(texts, special=True, cut=cut)

    def openings(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids that a language model goes on from: that of the beginning, where there is one, and no end. Raises
        BadInput for a text that is longer than max_length, or gives no token at all."""
        first = [] if self.spec.bos_token_id is None else [self.spec.bos_token_id]
        rows = [first + ids for ids, _ in self._ids(texts, special=False, cut=False)]
        for i, row in enumerate(rows):
            if not row:
                raise BadInput(f"{_which(texts, i)} is empty")
        return rows

    def _ids(self, texts: Sequence[str], *, special: bool, cut: bool) -> list[tuple[list[int], bool]]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        for i, encoding in enumerate(encodings):
            if encoding.overflowing and not cut:
                raise BadInput(
                    f"{_which(texts, i)} is longer than {self.spec.max_length} tokens, the most that are read"
                )
        return [(encoding.ids, bool(encoding.overflowing)) for encoding in encodings]

    def whole(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text, however long it is; special: with what the tokenizer puts around a text."""
        first = self.tokenizer.encode(text, add_special_tokens=special)
        parts = [first, *first.overflowing]
        if len(parts) == 1 or not special:
            return [token for part in parts for token in part.ids]
        own = [token for part in parts for token, around in _pairs(part) if not around]
        around = [bool(one) for one in first.special_tokens_mask]
        front = around.index(False) if False in around else len(around)
        behind = around[::-1].index(False) if False in around else 0
        return first.ids[:front] + own + first.ids[len(first.ids) - behind :]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids, without special tokens unless they are wanted."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def token(self, token: int) -> str:
        """What one id stands for, to be read by people."""
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id adds to a text: those of a character may come with several ids."""
        if token not in self.known_bytes:
            self.known_bytes[token] = self._bytes(token)
        return self.known_bytes[token]

    def _bytes(self, token: int) -> bytes:
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if token in self.added:
            return str(piece).encode()
        if "ByteLevel" in self.decoders:
            return bytes(BYTES.get(character, ord("?")) for character in piece)
        if found := BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        if "Metaspace" in self.decoders or "▁" in self.decoders:
            return str(piece).replace("▁", " ").encode()
        return str(self.tokenizer.decode([token], skip_special_tokens=False)).encode()


def _pairs(encoding: Encoding) -> Iterator[tuple[int, int]]:
    return zip(encoding.ids, encoding.special_tokens_mask, strict=True)


def _decoders(decoder: Any) -> Iterator[str]:
    """Kinds of a tokenizer's decoders, and what they replace."""
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        yield str((decoder.get("pattern") or {}).get("String"))
        for one in decoder.get("decoders", []):
            yield from _decoders(one)


def _byte_of_character() -> dict[str, int]:
    """How GPT-2 (Radford et al., 2019) writes bytes as characters: those that can be printed as they are, the others
    from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_of_character()
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def _which(texts: Sequence[str], place: int) -> str:
    return f"text {place}" if len(texts) > 1 else "the text"


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, max_length: int, multiple: int = PADDING_MULTIPLE
) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and `attention_mask`, int64 [rows, sequence]: sequence is the longest row, rounded up to a multiple
    (few distinct shapes let the runtime reuse its buffers) but never above max_length."""
    longest = max(len(row) for row in rows)
    sequence = min(-(-longest // multiple) * multiple, max(max_length, longest))
    ids = np.full((len(rows), sequence), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), sequence), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask
