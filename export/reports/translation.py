"""How good translations of held-out texts are: token by token with the right ones before, and written freely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure

from export.reports.chrf import chrf

GROUPS = 5
MOST_LISTED = 20
MOST_SHOWN = 8
MOST_CHARACTERS = 200


class Translated(msgspec.Struct, frozen=True, kw_only=True):
    """A held-out text, its translation in the data, and what the network writes. length: tokens of the reference."""

    source: str
    reference: str
    translation: str
    length: int


class LengthFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of the texts whose reference has `shortest` to `longest` tokens. chrf: of those that were translated."""

    shortest: int
    longest: int
    samples: int
    perplexity: float
    token_accuracy: float
    chrf: float | None = None


class TranslationReport(msgspec.Struct, frozen=True, kw_only=True):
    """loss: mean negative log-likelihood of a token in nats, given those before it; perplexity is its exponential.
    token_accuracy: share of the tokens that were the likeliest one. chrf: of greedy translations, from 0 to 1, of
    `translated` texts. by_length: texts in up to five groups of about equal number, the shortest first."""

    samples: int
    tokens: int
    loss: float
    perplexity: float
    token_accuracy: float
    translated: int = 0
    chrf: float | None = None
    by_length: list[LengthFigures]
    examples: list[Translated] = []

    def figures(self) -> dict[str, float]:
        """The single numbers, by name."""
        found = {"loss": self.loss, "perplexity": self.perplexity, "token_accuracy": self.token_accuracy}
        return found if self.chrf is None else {**found, "chrf": self.chrf}

    def plot(self, path: Path) -> None:
        """Figures by length as one PNG: whether long texts are translated as well as short ones."""
        names = [f"{group.shortest}-{group.longest}" for group in self.by_length]
        figure = Figure(figsize=(11.0, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.bar(names, [group.perplexity for group in self.by_length], color="seagreen")
        left.set(title=f"Perplexity (all {self.perplexity:.2f})", xlabel="tokens of the reference")
        places = np.arange(len(names))
        right.bar(places - 0.2, [group.token_accuracy for group in self.by_length], 0.4, color="seagreen")
        right.bar(places + 0.2, [group.chrf or 0.0 for group in self.by_length], 0.4, color="goldenrod")
        right.legend([f"token accuracy (all {self.token_accuracy:.3f})", f"chrF (all {self.chrf or 0.0:.3f})"])
        right.set_xticks(places, names)
        right.set(title="Token accuracy and chrF", xlabel="tokens of the reference", ylim=(0, 1))
        figure.savefig(path, dpi=110)

    def words(self) -> str:
        figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in self.figures().items())
        found = f"| metric | value |\n|---|---|\n{figures}"
        if not self.examples:
            return found
        rows = "\n".join(
            f"| {_cell(one.source)} | {_cell(one.reference)} | {_cell(one.translation)} |"
            for one in self.examples[:MOST_SHOWN]
        )
        return f"{found}\n\n| text | translation in the data | translation by this model |\n|---|---|---|\n{rows}"


def evaluation(losses: np.ndarray, right: np.ndarray, lengths: np.ndarray) -> TranslationReport:
    """losses: float32 [samples], negative log-likelihood of a whole text. right: int [samples], tokens that were the
    likeliest. lengths: int [samples], tokens that were predicted."""
    tokens = int(lengths.sum())
    loss = float(losses.sum(dtype=np.float64)) / tokens
    return TranslationReport(
        samples=len(lengths),
        tokens=tokens,
        loss=loss,
        perplexity=_perplexity(loss),
        token_accuracy=float(right.sum()) / tokens,
        by_length=[
            LengthFigures(
                shortest=int(lengths[group].min()),
                longest=int(lengths[group].max()),
                samples=len(group),
                perplexity=_perplexity(float(losses[group].sum(dtype=np.float64) / lengths[group].sum())),
                token_accuracy=float(right[group].sum() / lengths[group].sum()),
            )
            for group in _groups(lengths)
        ],
    )


def with_translations(report: TranslationReport, found: Sequence[Translated]) -> TranslationReport:
    """The report with the chrF of what was written, and the first of it as examples."""
    return msgspec.structs.replace(
        report,
        translated=len(found),
        chrf=_chrf(found),
        by_length=[
            msgspec.structs.replace(group, chrf=_chrf(inside) if inside else None)
            for group in report.by_length
            for inside in [[one for one in found if group.shortest <= one.length <= group.longest]]
        ],
        examples=list(found[:MOST_LISTED]),
    )


def _groups(lengths: np.ndarray) -> list[np.ndarray]:
    """Places of texts of neighbouring lengths; texts of one length are in one group."""
    ends = np.unique(np.quantile(lengths, np.arange(1, GROUPS + 1) / GROUPS, method="inverted_cdf"))
    number = np.searchsorted(ends, lengths)
    return [np.flatnonzero(number == i) for i in range(len(ends))]


def _chrf(found: Sequence[Translated]) -> float:
    return chrf([one.translation for one in found], [one.reference for one in found])


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # above it, more than a float holds


def _cell(text: str) -> str:
    shown = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
    return " ".join(shown.split()).replace("|", "\\|")
