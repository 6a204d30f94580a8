"""What one head of a network answers, as a client reads it."""

from __future__ import annotations

import msgspec
import numpy as np

from export.processing.answers import Prediction, label_set, top_k
from server.runtime.answers import Unsure


class Range(msgspec.Struct, frozen=True):
    """Where a number lies, with the share of certainty that the model's manifest states (95 in 100)."""

    low: float
    high: float


class HeadAnswer(msgspec.Struct, omit_defaults=True):
    """One kind of: a class (`label`, `probability`, the best ones in `top`); a set of labels (`labels`, and of all
    labels the `probabilities`); numbers by their names (`values`, and `interval` where it is known). `uncertainty`: how
    far the networks of an ensemble are apart."""

    label: str | None = None
    probability: float | None = None
    top: list[Prediction] | None = None
    labels: list[str] | None = None
    probabilities: dict[str, float] | None = None
    values: dict[str, float] | None = None
    interval: dict[str, Range] | None = None
    uncertainty: float | dict[str, float] | None = None


def head_answer(task: str, labels: list[str], row: np.ndarray | Unsure, k: int, threshold: float) -> HeadAnswer:
    """row: one of an answer of `server.runtime.answers`."""
    found, apart = sure(row)
    if task == "regression":
        unsure = None if apart is None else dict(zip(labels, apart.tolist(), strict=True))
        return HeadAnswer(values=values(labels, found), interval=interval(labels, found), uncertainty=unsure)
    uncertainty = None if apart is None else float(apart)
    if task == "multi_label":
        return HeadAnswer(
            labels=label_set(found, labels, threshold),
            probabilities=dict(zip(labels, found.tolist(), strict=True)),
            uncertainty=uncertainty,
        )
    best = top_k(found, labels, k)
    return HeadAnswer(label=best[0].label, probability=best[0].probability, top=best, uncertainty=uncertainty)


def sure(row: np.ndarray | Unsure) -> tuple[np.ndarray, np.ndarray | None]:
    """The answer, and the uncertainty where several networks gave it."""
    return row if isinstance(row, Unsure) else (row, None)


def values(names: list[str], numbers: np.ndarray) -> dict[str, float]:
    """numbers: float32 [1 or 3, names]."""
    return dict(zip(names, numbers[0].tolist(), strict=True))


def interval(names: list[str], numbers: np.ndarray) -> dict[str, Range] | None:
    """None where the ends are not among the numbers, float32 [1 or 3, names]."""
    if len(numbers) == 1:
        return None
    low, high = numbers[1].tolist(), numbers[2].tolist()
    return {name: Range(low[i], high[i]) for i, name in enumerate(names)}
