"""How well held-out items come back from their codes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure

QUANTILES = (0.5, 0.9, 0.95, 0.99, 1.0)
BINS = 40
# Nats above which a number of the code is said to carry something (Burda, Grosse and Salakhutdinov 2016 count alike).
ACTIVE = 0.01


class Quantile(msgspec.Struct, frozen=True):
    """So large a share of the items has an error of at most `error`: thresholds for what is not like the data."""

    share: float
    error: float


class ReconstructionReport(msgspec.Struct, frozen=True, kw_only=True):
    """loss: what was minimized, without penalties. error: the mean squared error, vectors in deviations of each number,
    pixels from 0 to 1. explained_variance: 1 - error / that of the training data's mean.

    edges, counts: histogram of the items' errors. Of a variational autoencoder: surprise, -log p(x | z), and kl,
    KL(q(z | x) ‖ p(z)), both in nats, whose sum is the loss and at least -log p(x); code_kl: that of each number of z.
    """

    samples: int
    loss: float
    error: float
    explained_variance: float
    quantiles: list[Quantile]
    edges: list[float]
    counts: list[int]
    surprise: float | None = None
    kl: float | None = None
    code_kl: list[float] = []

    def figures(self) -> dict[str, float]:
        """The single numbers, by name."""
        found = {"loss": self.loss, "error": self.error, "explained_variance": self.explained_variance}
        if self.surprise is not None and self.kl is not None:
            found |= {"surprise": self.surprise, "kl": self.kl}
        return found

    def plot(self, path: Path) -> None:
        """The distribution of errors, and what each number of a variational code carries, as one PNG."""
        figure = Figure(figsize=(12.0 if self.code_kl else 6.5, 4.0), layout="constrained")
        histogram, *more = figure.subplots(1, 2 if self.code_kl else 1, squeeze=False)[0]
        histogram.stairs(self.counts, self.edges, fill=True, color="seagreen")
        for quantile in self.quantiles[1:-1]:
            histogram.axvline(quantile.error, color="black", linestyle="--", linewidth=0.8)
            histogram.annotate(
                f" {quantile.share:.0%}",
                (quantile.error, 0.98),
                xycoords=("data", "axes fraction"),
                fontsize=8,
                va="top",
            )
        histogram.set(title=f"Error of an item (mean {self.error:.4g})", xlabel="mean squared error", ylabel="items")
        if more:
            more[0].bar(range(len(self.code_kl)), sorted(self.code_kl, reverse=True), color="seagreen")
            title = f"What each number of the code carries ({self.active} of {len(self.code_kl)} active)"
            more[0].set(title=title, xlabel="numbers, from the one that carries most", ylabel="nats")
        figure.savefig(path, dpi=110)

    @property
    def active(self) -> int:
        """Numbers of a variational code that differ from the prior."""
        return sum(nats > ACTIVE for nats in self.code_kl)

    def words(self) -> str:
        figures = "\n".join(f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in self.figures().items())
        limits = "\n".join(f"| {quantile.share:.0%} | {quantile.error:.6g} |" for quantile in self.quantiles)
        active = f"\n\n{self.active} of the {len(self.code_kl)} numbers of the code carry something." * bool(
            self.code_kl
        )
        return (
            f"| metric | value |\n|---|---|\n{figures}{active}\n\n"
            "An item whose error is larger than that of nearly all of these is not like them:\n\n"
            f"| share of items | error at most |\n|---|---|\n{limits}"
        )


def evaluation(
    error: np.ndarray, spread: np.ndarray, surprise: np.ndarray | None = None, code_kl: np.ndarray | None = None
) -> ReconstructionReport:
    """error, spread: float32 [samples], mean squares of what is missing in the reconstruction, and of the input less
    the training data's mean. surprise: float32 [samples]; code_kl: float32 [samples, code]."""
    counts, edges = np.histogram(error, BINS)
    mean = float(error.mean(dtype=np.float64))
    variation = float(spread.mean(dtype=np.float64))
    found = ReconstructionReport(
        samples=len(error),
        loss=mean,
        error=mean,
        explained_variance=1.0 - mean / variation if variation > 0.0 else 0.0,
        quantiles=[Quantile(share, float(np.quantile(error, share))) for share in QUANTILES],
        edges=edges.tolist(),
        counts=counts.tolist(),
    )
    if surprise is None or code_kl is None:
        return found
    nats, divergence = float(surprise.mean(dtype=np.float64)), float(code_kl.sum(axis=1).mean(dtype=np.float64))
    return msgspec.structs.replace(
        found, loss=nats + divergence, surprise=nats, kl=divergence, code_kl=code_kl.mean(axis=0).tolist()
    )
