"""How well tokens of held-out texts are predicted, beside a guess that knows only how often each token occurs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure

# Tokens are looked at by their place in the text: the first, the next 2, the next 4, and so on.
PLACES = 13
# Characters of a prompt or an answer in the model card.
MOST_SHOWN = 300
# e to more than this is no float.
MOST_NATS = 700.0


class PlaceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tokens from place `first` to `last` of their texts, counted from 1; loss: mean, in nats."""

    first: int
    last: int
    tokens: int
    loss: float


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked, the answer of the data, and that of the model at temperature 0, its first tokens."""

    prompt: str
    reference: str
    answer: str


class Before(msgspec.Struct, frozen=True, kw_only=True):
    """Of the same tokens, by the model that the training began with."""

    loss: float
    perplexity: float
    token_accuracy: float


class LanguageModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """samples: texts. loss: mean of -log p of a token, in nats; perplexity is e to it. token_accuracy: how often the
    most probable token is the right one.

    bits_per_byte, bits_per_character: of UTF-8, the end of each text counted among the bits: whatever the tokens are,
    these compare. None where only some tokens are predicted. unigram_perplexity, unigram_accuracy: the same by how
    often each token occurs in the training texts, and by always answering the most frequent. before: None where
    training began with random weights. answers: of a few chats.
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
    before: Before | None = None
    answers: list[Answered] = []

    def figures(self) -> dict[str, float]:
        """The single numbers, by name."""
        found = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "token_accuracy": self.token_accuracy,
            "unigram_perplexity": self.unigram_perplexity,
            "unigram_accuracy": self.unigram_accuracy,
        }
        if self.before is not None:
            found["perplexity_before"] = self.before.perplexity
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
        if self.before is not None:
            before = f"before training: {self.before.perplexity:.1f}"
            by_place.axhline(self.before.perplexity, color="indianred", linestyle=":", label=before)
        by_place.set(title="Perplexity", xlabel="place of the token in its text", yscale="log")
        by_place.tick_params(axis="x", rotation=45)
        by_place.legend()
        accuracy.bar(["unigram", "model"], [self.unigram_accuracy, self.token_accuracy], color=["grey", "seagreen"])
        accuracy.set(title="Accuracy of the first guess", ylim=(0, 1))
        figure.savefig(path, dpi=110)

    def words(self) -> str:
        rows = [
            ["metric", "model", "unigram"],
            ["---"] * 3,
            ["perplexity", f"{self.perplexity:.2f}", f"{self.unigram_perplexity:.2f}"],
            ["accuracy", f"{self.token_accuracy:.4f}", f"{self.unigram_accuracy:.4f}"],
        ]
        for name, value in (("bits a byte", self.bits_per_byte), ("bits a character", self.bits_per_character)):
            if value is not None:
                rows.append([name, f"{value:.3f}", ""])
        if self.before is not None:
            told = ["before training", "---", f"{self.before.perplexity:.2f}", f"{self.before.token_accuracy:.4f}"]
            rows = [[*row, cell] for row, cell in zip_longest(rows, told, fillvalue="")]
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        shown = "".join(
            f"\n\n> {_quoted(one.prompt)}\n\n- data: {_quoted(one.reference)}\n- model: {_quoted(one.answer)}"
            for one in self.answers
        )
        return f"Of {self.tokens:,} tokens:\n\n{lines}{shown}"

    def sentence(self) -> str:
        """The one figure, in a sentence."""
        before = "" if self.before is None else f", {self.before.perplexity:.1f} before"
        return f"perplexity {self.perplexity:.1f} on {self.tokens:,} held-out tokens{before}"


def with_answers(report: LanguageModelReport, answers: list[Answered]) -> LanguageModelReport:
    return msgspec.structs.replace(report, answers=answers)


def compared(report: LanguageModelReport, before: LanguageModelReport) -> LanguageModelReport:
    """With how the same tokens were predicted before training."""
    found = Before(loss=before.loss, perplexity=before.perplexity, token_accuracy=before.token_accuracy)
    return msgspec.structs.replace(report, before=found)


def _quoted(text: str) -> str:
    """On one line, and not for too long."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_SHOWN else f"{line[: MOST_SHOWN - 1]}…"


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
