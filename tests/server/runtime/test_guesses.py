"""What a text is guessed to go on with, and when no guess is made."""

from __future__ import annotations

import numpy as np

from server.runtime.guesses import MOST, Guesses, continuation


def continued(text: str, most: int = 4) -> str:
    return "".join(map(chr, continuation(np.array(list(map(ord, text))), most)))


def test_it_is_what_followed_the_last_time() -> None:
    assert continued("abcdXab") == "cdXa"
    assert continued("ab1 ab2 ab") == "2 ab"
    assert continued("ab1 ab2 ab", most=1) == "2"
    assert continued("aaa") == "a"


def test_a_text_without_repetition_has_none() -> None:
    assert continued("abcdefg") == continued("ab") == continued("a") == continued("") == ""
    assert continued("abcab", most=0) == ""


def test_guesses_are_longer_while_they_are_right_and_pause_while_they_are_wrong() -> None:
    text, guesses = np.tile(np.arange(10), 5), Guesses()
    lengths = []
    for _ in range(4):
        lengths.append(len(guesses.next(text, 100)))
        guesses.learn(lengths[-1], lengths[-1])
    assert lengths == [2, 4, MOST, MOST]
    assert len(guesses.next(text, 3)) == 3
    steps = []
    for _ in range(6):
        pauses = 0
        while not len(guess := guesses.next(text, 100)):
            pauses += 1
        steps.append(pauses)
        guesses.learn(len(guess), 0)
    assert steps == sorted(steps)
    assert steps[0] == 0 < steps[-1]
    guesses.pause = 0
    guesses.learn(2, 1)
    assert len(guesses.next(text, 100)) == 2
