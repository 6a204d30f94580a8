"""A text that comes token by token: what can be sent of it already."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class GrowingText:
    """`add` tells what is certain to be in the text; a character whose bytes are not all there is held back, and so
    is what may be the beginning of a stop text."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.stream = DecodeStream(skip_special_tokens=True)
        self.text = ""
        self.given = 0

    def add(self, token: int) -> str:
        """What the token brings; often nothing."""
        self.text += self.stream.step(self.tokenizer, token) or ""
        certain = min(len(before(self.text, self.stops)), len(self.text) - begun(self.text, self.stops))
        new = self.text[self.given : certain]
        self.given += len(new)
        return new

    def rest(self, whole: str) -> str:
        """What remains to be given out of the whole text, now that it is known."""
        return whole[self.given :]


def before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop texts in it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop text."""
    return max((k for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k])), default=0)
