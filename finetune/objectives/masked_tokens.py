"""Tokens that were hidden, given all others: how an encoder learns from texts without labels (Devlin et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finetune.objectives.token_prediction import TokenPrediction, before
from finetune.vocabulary import MASK, SPECIAL

SHARE = 0.15
MASKED, REPLACED = 0.8, 0.1
# Evaluations hide the same tokens every time.
EVALUATION_SEED = 2018


class MaskedTokens(TokenPrediction):
    """Of a text's tokens 15 % are asked for, one at least: 80 % of these are hidden behind [MASK], 10 % replaced by
    any token, 10 % left as they are."""

    def asked(self, targets: Tensor) -> Tensor:
        inside = (targets >= 0).sum(1) - 2  # neither [BOS] nor [EOS]
        return (SHARE * inside).round().long().clamp(min=1)

    def outputs(
        self, model: nn.Module, inputs: list[Tensor], targets: Tensor, step: int | None
    ) -> Mapping[str, Tensor]:
        """The choice is made by the generator of the training step, in an evaluation by one that begins anew."""
        input_ids, attention_mask = inputs
        generator = torch.default_generator if step is not None else torch.Generator().manual_seed(EVALUATION_SEED)
        order, dice = torch.rand((2, *targets.shape), generator=generator).to(targets.device)
        others = torch.randint(len(SPECIAL), self.vocabulary, targets.shape, generator=generator).to(targets.device)
        place = torch.arange(targets.shape[1], device=targets.device)
        outside = (place == 0) | (place >= ((targets >= 0).sum(1) - 1)[:, None])
        chosen = order.masked_fill(outside, 2.0).argsort(1).argsort(1) < self.asked(targets)[:, None]
        shown = targets.where(dice >= MASKED + REPLACED, others).masked_fill(dice < MASKED, MASK)
        asked = before(chosen, input_ids.shape[1])
        hidden = input_ids.clone()
        hidden[asked] = shown[chosen]
        found = model(hidden, attention_mask, asked)
        row, at = chosen.nonzero(as_tuple=True)
        return {"logits": found["logits"], "wanted": targets[chosen], "row": row, "place": (at - 1).clamp(min=0)}
