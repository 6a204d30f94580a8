"""A text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class GrowingText:
    """`add` tells what is certain to be in the text; a character whose bytes are not all there is held back, and so
    is what may be the beginning of a stop text. length: of all that has come, given: of what was told."""

    __slots__ = ("given", "held", "length", "stopped", "stops", "stream", "tokenizer")

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.stream = DecodeStream(skip_special_tokens=True)
        self.held = ""
        self.given = self.length = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """What the token brings; often nothing."""
        new = self.stream.step(self.tokenizer, token)
        if not new:
            return ""
        self.length += len(new)
        if self.stops:
            if self.stopped:
                return ""
            new = self.held + new
            self.stopped = (text := before(new, self.stops)) != new
            certain = len(text) if self.stopped else len(new) - begun(new, self.stops)
            new, self.held = new[:certain], new[certain:]
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
