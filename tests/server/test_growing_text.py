"""What is given of a text while it grows is never taken back."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from server.growing_text import GrowingText, before, begun


def bytes_only() -> Tokenizer:
    """Every byte is a token, so that characters come in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces(text: str, *stops: str) -> list[str]:
    tokenizer = bytes_only()
    growing = GrowingText(tokenizer, stops)
    ids = tokenizer.encode(text).ids
    given = [growing.add(token) for token in ids]
    return [*given, growing.rest(before(tokenizer.decode(ids), stops))]


def test_a_character_is_given_whole() -> None:
    assert pieces("né 猫") == ["n", "", "é", " ", "", "", "猫", ""]


def test_what_may_begin_a_stop_text_is_held_back() -> None:
    assert pieces("a--b", "--!") == ["a", "", "", "--b", ""]
    assert pieces("a--", "--!") == ["a", "", "", "--"]
    assert pieces("ab--!c", "--!", "c") == ["a", "b", "", "", "", "", ""]


def test_the_first_stop_text_counts() -> None:
    assert before("one two three", ["three", "two"]) == "one "
    assert before("one", []) == "one"
    assert begun("one t", ["two", "e two"]) == 3
