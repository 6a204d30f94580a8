"""The next token of a text, given all before it: a language model (Bengio et al. 2003)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finetune.objectives.token_prediction import TokenPrediction, before
from finetune.vocabulary import PAD


class NextToken(TokenPrediction):
    """Every token but the first is asked for, the end of a text too."""

    whole = True

    def asked(self, targets: Tensor) -> Tensor:
        return (targets != PAD).sum(1) - 1

    def outputs(
        self, model: nn.Module, inputs: list[Tensor], targets: Tensor, step: int | None
    ) -> Mapping[str, Tensor]:
        """The model is asked at the place before each token."""
        input_ids, attention_mask = inputs
        known = torch.arange(targets.shape[1], device=targets.device) < self.asked(targets)[:, None]
        found = model(input_ids, attention_mask, before(known, input_ids.shape[1]))
        row, place = known.nonzero(as_tuple=True)
        return {"logits": found["logits"], "wanted": targets[row, place + 1], "row": row, "place": place}
