"""How well tokens of held-out texts are predicted, beside a guess that knows only how often each token occurs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure

# Tokens are looked at by their place in the text: the first, the next 2, the next 4, and so on.
PLACES = 13
# e to more than this is no float.
MOST_NATS = 700.0


class PlaceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tokens from place `first` to `last` of their texts, counted from 1; loss: mean, in nats."""

    first: int
    last: int
    tokens: int
    loss: float


class LanguageModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """samples: texts. loss: mean of -log p of a token, in nats; perplexity is e to it. token_accuracy: how often the
    most probable token is the right one.

    bits_per_byte, bits_per_character: of UTF-8, the end of each text counted among the bits: whatever the tokens are,
    these compare. None where only some tokens are predicted. unigram_perplexity, unigram_accuracy: the same by how
    often each token occurs in the training texts, and by always answering the most frequent.
    """

    samples: int
    tokens: int
    loss: float
    perplexity: float
    token_accuracy: float
    unigram_perplexity: float
    unigram_accuracy: float
    bits_per_byte: float | None
    bits_per_character: float | None
    places: list[PlaceFigures]

    def figures(self) -> dict[str, float]:
        """The single numbers, by name."""
        found = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "token_accuracy": self.token_accuracy,
            "unigram_perplexity": self.unigram_perplexity,
            "unigram_accuracy": self.unigram_accuracy,
        }
        bits = {"bits_per_byte": self.bits_per_byte, "bits_per_character": self.bits_per_character}
        return {**found, **{name: value for name, value in bits.items() if value is not None}}

    def plot(self, path: Path) -> None:
        """Perplexity by the place in the text, and accuracy, each beside the baseline, as one PNG."""
        figure = Figure(figsize=(11.0, 4.5), layout="constrained")
        by_place, accuracy = figure.subplots(1, 2, width_ratios=[3, 1])
        names = [str(p.first) if p.first == p.last else f"{p.first}-{p.last}" for p in self.places]
        by_place.bar(names, [math.exp(min(p.loss, MOST_NATS)) for p in self.places], color="seagreen")
        by_place.axhline(self.unigram_perplexity, color="grey", linestyle="--", label="unigram baseline")
        by_place.axhline(self.perplexity, color="black", linewidth=1, label=f"all tokens: {self.perplexity:.1f}")
        by_place.set(title="Perplexity", xlabel="place of the token in its text", yscale="log")
        by_place.tick_params(axis="x", rotation=45)
        by_place.legend()
        accuracy.bar(["unigram", "model"], [self.unigram_accuracy, self.token_accuracy], color=["grey", "seagreen"])
        accuracy.set(title="Accuracy of the first guess", ylim=(0, 1))
        figure.savefig(path, dpi=110)

    def words(self) -> str:
        rows = [
            ("perplexity", f"{self.perplexity:.2f}", f"{self.unigram_perplexity:.2f}"),
            ("accuracy", f"{self.token_accuracy:.4f}", f"{self.unigram_accuracy:.4f}"),
        ]
        for name, value in (("bits a byte", self.bits_per_byte), ("bits a character", self.bits_per_character)):
            if value is not None:
                rows.append((name, f"{value:.3f}", ""))
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"Of {self.tokens:,} tokens:\n\n| metric | model | unigram |\n|---|---|---|\n{lines}"


def evaluation(sums: Mapping[str, np.ndarray], whole: bool) -> LanguageModelReport:
    """sums: over the predicted tokens of each text, float64 [texts, ...] by name.

    `tokens` and `losses` (-log p) [texts, PLACES], by place; `right`, `usual`: how often the first guess, and the most
    frequent token, is right; `unigram`: -log p of the frequencies; `bytes`, `characters`. whole: whether every token is
    predicted from those before it, so that the losses add up to the whole text's.
    """
    tokens, losses = sums["tokens"].sum(0), sums["losses"].sum(0)
    count = float(tokens.sum())
    loss = float(losses.sum()) / count
    bits = float(losses.sum()) / math.log(2.0)
    read, letters = float(sums["bytes"].sum()), float(sums["characters"].sum())
    return LanguageModelReport(
        samples=len(sums["tokens"]),
        tokens=int(count),
        loss=loss,
        perplexity=math.exp(min(loss, MOST_NATS)),
        token_accuracy=float(sums["right"].sum()) / count,
        unigram_perplexity=math.exp(float(sums["unigram"].sum()) / count),
        unigram_accuracy=float(sums["usual"].sum()) / count,
        bits_per_byte=bits / read if whole and read else None,
        bits_per_character=bits / letters if whole and letters else None,
        places=[
            PlaceFigures(first=2**i, last=2 ** (i + 1) - 1, tokens=int(tokens[i]), loss=float(losses[i] / tokens[i]))
            for i in range(PLACES)
            if tokens[i]
        ],
    )
