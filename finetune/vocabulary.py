"""A tokenizer of one's own, for texts that are learned from nothing: byte-level byte pair encoding.

Sennrich, Haddow and Birch 2016, over bytes as in Radford et al. 2019: whatever the text, there is no unknown token, and
ids decode to exactly the text they came from.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD, UNK, BOS, EOS = range(4)
SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")
# Every byte has a token of its own.
SMALLEST = len(SPECIAL) + 256


def train_tokenizer(texts: Iterable[str], size: int) -> bytes:
    """The tokenizer.json of at most `size` tokens learned from `texts`; fewer when the texts have no more to merge.

    Every text becomes [BOS] … [EOS]. The same texts in the same order give the same bytes. Raises ValueError when
    `size` has no room for the bytes.
    """
    if size < SMALLEST:
        raise ValueError(f"vocabulary_size: {size}; every byte and {len(SPECIAL)} special tokens need {SMALLEST}")
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNK]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
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
