"""Texts to token ids and padded batches. Training and serving both tokenize through TextProcessor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids)))

    def token(self, token: int) -> str:
        """What one id stands for, to be read by people."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


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
