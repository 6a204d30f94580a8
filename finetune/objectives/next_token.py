"""The next token of a text, given all before it: a language model (Bengio et al. 2003)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from finetune.objectives.token_prediction import TokenPrediction, before
from finetune.packing import packed


class NextToken(TokenPrediction):
    """Every token of the targets but the first is asked for, at the place before it; those that are below 0 are read
    and not asked for. Nothing is asked where the token at that place is left out (`augmentation.word_dropout`); the
    others count more for it."""

    whole = True

    def __init__(self, train: np.ndarray, sizes: np.ndarray, *, row: int | None = None) -> None:
        """row: of packed texts, the most tokens of a row; None: each text has a row of its own."""
        super().__init__(train, sizes)
        self.row = row
        self.packs = row is not None

    def asked(self, targets: Tensor) -> Tensor:
        return (targets[:, 1:] >= 0).sum(1)

    def outputs(
        self, model: nn.Module, inputs: list[Tensor], targets: Tensor, step: int | None
    ) -> Mapping[str, Tensor]:
        """The model is asked at the place before each token. `share`: of what is to be asked for, what is."""
        input_ids, attention_mask = inputs
        known = (targets[:, 1:] >= 0) & attention_mask[:, : targets.shape[1] - 1].bool()
        row, place = known.nonzero(as_tuple=True)
        if self.row is None:
            found = model(input_ids, attention_mask, before(known, input_ids.shape[1]))
        else:
            there = attention_mask.bool() | (before(targets >= 0, input_ids.shape[1]))
            within = torch.arange(1, there.shape[1] + 1, device=there.device)
            texts = packed(input_ids, attention_mask, (there * within).amax(1), self.row)
            asked = torch.zeros(texts.segments.numel(), dtype=torch.bool, device=input_ids.device)
            where = texts.place[row, place]
            asked[where] = True
            order = where.argsort()  # logits come row by row
            row, place = row[order], place[order]
            found = model(texts.input_ids, texts.segments, asked.view_as(texts.segments))
        share = known.sum() / self.asked(targets).sum()
        wanted = targets[row, place + 1]
        return {"logits": found["logits"], "wanted": wanted, "row": row, "place": place, "share": share}

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) / outputs["share"].clamp(min=torch.finfo(torch.float32).tiny)
