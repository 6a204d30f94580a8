"""The tokenizer that is learned from the training texts."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from export.processing.inputs import TextInput
from export.processing.text import TextProcessor
from finetune.vocabulary import BOS, EOS, PAD, SMALLEST, UNK, tokens_of, train_tokenizer

TEXTS = ["the lowest price is lower than low", "a new low, the newest and the lowest", "Ein neuer, größerer Preis"] * 3


def test_the_same_texts_give_the_same_file() -> None:
    assert train_tokenizer(iter(TEXTS), 320) == train_tokenizer(TEXTS, 320)


def test_what_recurs_becomes_a_token_and_sizes_are_kept() -> None:
    learned = Tokenizer.from_str(train_tokenizer(TEXTS, 400).decode())
    assert learned.encode("the lowest").tokens == ["[BOS]", "the", "Ġlowest", "[EOS]"]
    assert tokens_of(train_tokenizer(TEXTS, 300)) == 300
    assert tokens_of(train_tokenizer(TEXTS, 100_000)) < 500
    assert [learned.token_to_id(token) for token in ("[PAD]", "[UNK]", "[BOS]", "[EOS]")] == [PAD, UNK, BOS, EOS]


def test_any_text_comes_back_from_its_ids() -> None:
    processor = TextProcessor(TextInput(max_length=64), train_tokenizer(TEXTS, 320))
    text = "Größe 猫 🐈 and\tnever-seen  words"
    (ids,) = processor.encode([text])
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert UNK not in ids
    assert processor.tokenizer.decode(ids) == text


def test_a_long_text_is_cut_between_its_ends() -> None:
    (ids,) = TextProcessor(TextInput(max_length=8), train_tokenizer(TEXTS, 320)).encode(["xyz" * 50])
    assert len(ids) == 8
    assert (ids[0], ids[-1]) == (BOS, EOS)


def test_too_few_tokens_for_the_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=str(SMALLEST)):
        train_tokenizer(TEXTS, SMALLEST - 1)
