"""Translation: the cross-entropy of every token of the target, given the source and the tokens before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor, nn

from export.processing.text import TextProcessor
from export.reports import translation as report
from export.reports.evaluation import Evaluation
from export.reports.translation import Translated, TranslationReport
from finetune import greedy, recipe
from finetune.objectives.objective import Objective
from finetune.preprocess import Items, tensors
from finetune.task import METRICS
from finetune.vocabulary import BOS, EOS, PAD
from models.network import Network

# Held-out texts that are translated freely, and how many at once.
MOST_TRANSLATED = 200
AT_ONCE = 50


class Translation(Objective):
    """Teacher forcing (Williams and Zipser 1989). `targets` int64 [batch, tokens] are [BOS] … [EOS], padded behind the
    end. The network is called with the source and all tokens but the last, `model(input_ids, attention_mask,
    targets[:, :-1])`, and answers `logits` float32 [batch, tokens - 1, target vocabulary]: those at place t, which no
    later token may have a say in, are of token t + 1. It gets no mask of the targets: padding stands behind the end,
    and what is answered there counts nothing.
    """

    metrics = METRICS[recipe.Translation]
    falling = frozenset({"perplexity"})

    def __init__(self, label_smoothing: float, source: TextProcessor, target: TextProcessor) -> None:
        """source, target: what turns tokens of the examples into texts."""
        self.label_smoothing = label_smoothing
        self.source, self.target = source, target

    def outputs(
        self, model: nn.Module, inputs: list[Tensor], targets: Tensor, step: int | None
    ) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = model(*inputs, targets[:, :-1])
        return found

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Sum over all tokens that are no padding."""
        return nn.functional.cross_entropy(
            outputs["logits"].float().flatten(0, 1),
            targets[:, 1:].flatten(),
            ignore_index=PAD,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def weight(self, targets: Tensor) -> float:
        """The number of those tokens."""
        return float((targets[:, 1:] != PAD).sum())

    def kept(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """`losses` float32 [batch], without smoothing, and `right` int64 [batch], of each text."""
        logits, wanted = outputs["logits"].float(), targets[:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=PAD, reduction="none")
        right = (logits.argmax(2) == wanted) & (wanted != PAD)
        return {"losses": losses.sum(1), "right": right.sum(1)}

    def report(self, kept: dict[str, np.ndarray], targets: np.ndarray) -> TranslationReport:
        """targets: int64 [tokens] each, as objects."""
        lengths = np.array([len(tokens) - 1 for tokens in targets])
        return report.evaluation(kept["losses"], kept["right"], lengths)

    def examined(self, network: Network, items: Items, found: Evaluation, between: Callable[[], None]) -> Evaluation:
        """With greedy translations of at most 200 of the items, spread evenly."""
        assert isinstance(found, TranslationReport)
        rows = np.unique(np.linspace(0, len(items) - 1, MOST_TRANSLATED).astype(int))
        device = next(network.parameters()).device
        written: list[Translated] = []
        for positions in np.array_split(rows, -(-len(rows) // AT_ONCE)):
            input_ids, attention_mask = tensors(items.batch(positions), device)
            answers = greedy.translate(
                network,
                input_ids,
                attention_mask,
                begin=BOS,
                end=EOS,
                max_tokens=self.target.spec.max_length,
                between=between,
            )
            sources = [row[mask].tolist() for row, mask in zip(input_ids, attention_mask.bool(), strict=True)]
            for position, source, answer in zip(positions, sources, answers, strict=True):
                wanted = items.targets[position]
                written.append(
                    Translated(
                        source=self.source.decode(source),
                        reference=self.target.decode(wanted.tolist()),
                        translation=self.target.decode(answer),
                        length=len(wanted) - 1,
                    )
                )
        return report.with_translations(found, written)
