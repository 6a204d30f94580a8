"""A tokenizer of one's own, for texts that are learned from nothing: byte-level byte pair encoding.

Sennrich, Haddow and Birch 2016, over bytes as in Radford et al. 2019: whatever the text, there is no unknown token, and
ids decode to exactly the text they came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD, UNK, BOS, EOS, MASK = range(5)
SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]")
# In the place of a token that is not to be predicted.
UNASKED = -1
# What pieces of a text have for a space, and for a byte that is in none of them.
SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Every byte has a token of its own.
SMALLEST = len(SPECIAL) + 256


def train_tokenizer(texts: Iterable[str], size: int, more: Sequence[str] = ()) -> bytes:
    """The tokenizer.json of at most `size` tokens learned from `texts`; fewer when the texts have no more to merge.

    more: further special tokens. Every text becomes [BOS] … [EOS]. The same texts in the same order give the same
    bytes. Raises ValueError when `size` has no room for the bytes.
    """
    if size < SMALLEST + len(more):
        special = len(SPECIAL) + len(more)
        raise ValueError(f"vocabulary_size: {size}; every byte and {special} special tokens need {256 + special}")
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNK]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[*SPECIAL, *more],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A {SPECIAL[EOS]}",
        special_tokens=[(SPECIAL[BOS], BOS), (SPECIAL[EOS], EOS)],
    )
    return tokenizer.to_str().encode()


def tokens_of(tokenizer: bytes) -> int:
    """The number of tokens of a tokenizer.json: ids are below it."""
    return int(Tokenizer.from_str(tokenizer.decode()).get_vocab_size())


def token_sizes(tokenizer: bytes) -> np.ndarray:
    """How many bytes of UTF-8 each token stands for, and how many characters begin in it: int64 [tokens, 2], zeros for
    the special ones. Of a byte-level tokenizer, as `train_tokenizer` makes them, or one of pieces with ▁ for a space
    and <0xF0> for a byte (Kudo and Richardson 2018)."""
    read = Tokenizer.from_str(tokenizer.decode())
    vocabulary = read.get_vocab()
    special = {place for place, token in read.get_added_tokens_decoder().items() if token.special}
    byte = {} if any(SPACE in token for token in vocabulary) else bytes_by_letter()
    found = np.zeros((max(vocabulary.values()) + 1, 2), np.int64)
    for token, place in vocabulary.items():
        if place in special:
            continue
        if piece := BYTE.fullmatch(token):
            text = bytes([int(piece[1], 16)])
        elif byte.keys() >= set(token):
            text = bytes(byte[letter] for letter in token)
        else:
            text = token.replace(SPACE, " ").encode()
        found[place] = len(text), sum(one & 0xC0 != 0x80 for one in text)
    return found


def bytes_by_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level token stands for (Radford et al. 2019): bytes that print stand for
    themselves, the others for letters from 256 on."""
    printed = (*range(33, 127), *range(161, 173), *range(174, 256))
    others = sorted(set(range(256)) - set(printed))
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}
