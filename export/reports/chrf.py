"""chrF: how many character n-grams two texts share (Popović 2015, "chrF: character n-gram F-score for automatic MT
evaluation")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

ORDER = 6
BETA = 2.0


def chrf(translations: Sequence[str], references: Sequence[str]) -> float:
    """From 0 to 1, of a whole set: n-grams of 1 to 6 characters without white space are counted over all texts, their
    precisions and recalls averaged over n, and recall counts β² = 4 times as much in the F-score.

    An n that no pair of texts is long enough for is left out. As sacrebleu's chrF2, which is 100 times as much.
    """
    precisions: list[float] = []
    recalls: list[float] = []
    pairs = [
        ("".join(one.split()), "".join(other.split())) for one, other in zip(translations, references, strict=True)
    ]
    for order in range(1, ORDER + 1):
        said, meant, shared = 0, 0, 0
        for translation, reference in pairs:
            found, wanted = ngrams(translation, order), ngrams(reference, order)
            said += found.total() if wanted else 0  # where there is nothing to be found, nothing is wrong
            meant += wanted.total()
            shared += (found & wanted).total()
        if said and meant:
            precisions.append(shared / said)
            recalls.append(shared / meant)
    if not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1.0 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))
