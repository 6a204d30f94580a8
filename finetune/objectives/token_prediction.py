"""What objectives share that predict tokens of unlabelled texts: the cross-entropy, and how good it is found to be."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from export.reports import language_model
from export.reports.evaluation import Evaluation
from export.reports.language_model import PLACES, LanguageModelReport
from finetune import recipe
from finetune.objectives.objective import Objective
from finetune.task import METRICS


class TokenPrediction(Objective):
    """-log p of each token that is asked for, in nats, summed; a mean is one over tokens.

    Targets are the texts' own tokens, int64 [batch, tokens], UNASKED behind the end. Outputs are `logits`
    float32 [asked, vocabulary], `wanted` int64 [asked], and where these stand, `row` and `place` int64 [asked].
    """

    metrics = METRICS[recipe.NextToken]
    falling = frozenset({"perplexity"})
    compares = True
    whole = False

    def __init__(self, train: np.ndarray, sizes: np.ndarray) -> None:
        """train: the tokens of each training text, int64 [tokens] as objects: how often each occurs is the baseline.
        sizes: int64 [vocabulary, 2], bytes and characters of each token."""
        self.vocabulary = len(sizes)
        self.sizes = torch.from_numpy(sizes)
        # The first token is never asked for. Every token counts once more than it occurs.
        tokens = np.concatenate([tokens[1:] for tokens in train])
        counts = np.bincount(tokens[tokens >= 0], minlength=self.vocabulary) + 1
        self.unigram = torch.from_numpy(-np.log(counts / counts.sum())).float()
        self.usual = int(counts.argmax())

    def asked(self, targets: Tensor) -> Tensor:
        """How many tokens of each text are asked for: int64 [batch]."""
        raise NotImplementedError

    def weight(self, targets: Tensor) -> float:
        return float(self.asked(targets).sum())

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs["logits"].float(), outputs["wanted"], reduction="sum")

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Sums over the tokens of each text; `tokens` and `losses` by their places, float64 [batch, PLACES]."""
        logits, wanted, row = outputs["logits"].float(), outputs["wanted"], outputs["row"]
        losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
        bytes_and_characters = self.sizes.to(row.device)[wanted]
        band = ((outputs["place"] + 1).float().frexp().exponent - 1).clamp(max=PLACES - 1)

        def summed(values: Tensor) -> Tensor:
            sums = torch.zeros(len(targets), dtype=torch.float64, device=row.device)
            return sums.index_add_(0, row, values.double())

        def by_place(values: Tensor) -> Tensor:
            sums = torch.zeros(len(targets) * PLACES, dtype=torch.float64, device=row.device)
            return sums.index_add_(0, row * PLACES + band, values.double()).view(-1, PLACES)

        return {
            "tokens": by_place(torch.ones_like(losses)),
            "losses": by_place(losses),
            "right": summed(logits.argmax(1) == wanted),
            "unigram": summed(self.unigram.to(row.device)[wanted]),
            "usual": summed(wanted == self.usual),
            "bytes": summed(bytes_and_characters[:, 0]),
            "characters": summed(bytes_and_characters[:, 1]),
        }

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> LanguageModelReport:
        return language_model.evaluation(kept, self.whole)

    def compared(self, found: Evaluation, before: Evaluation) -> tuple[Evaluation, str]:
        assert isinstance(found, LanguageModelReport)
        assert isinstance(before, LanguageModelReport)
        both = language_model.compared(found, before)
        return both, both.sentence()


def before(asked: Tensor, length: int) -> Tensor:
    """bool [batch, tokens] → bool [batch, length], False behind the texts' ends."""
    return nn.functional.pad(asked, (0, length - asked.shape[1]))
