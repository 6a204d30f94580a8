"""The translation objective: what counts in its loss, what its report says, and how targets become tokens."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.processing.inputs import TextInput
from export.processing.text import TextProcessor
from export.reports.translation import Translated, with_translations
from finetune.objectives.translation import Translation
from finetune.preprocess import Items, Written, written_tokens
from finetune.vocabulary import BOS, EOS, PAD, train_tokenizer

WORDS = 9
TOKENIZER = train_tokenizer(["una pagina", "la pagina"], 300)
SPEC = TextInput(max_length=12, bos_token_id=BOS, eos_token_id=EOS)
TARGETS = torch.tensor([[BOS, 5, 6, EOS, PAD], [BOS, 7, 8, 4, EOS]])


class Bigrams(nn.Module):
    """Logits by the last token and the number of source tokens: what comes later has no say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(WORDS, WORDS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"logits": self.table[targets] * attention_mask.sum(1)[:, None, None]}


def objective(smoothing: float = 0.0) -> Translation:
    processor = TextProcessor(SPEC, TOKENIZER)
    return Translation(smoothing, processor, processor)


def outputs(targets: Tensor = TARGETS) -> dict[str, Tensor]:
    mask = torch.ones(len(targets), 1, dtype=torch.int64)
    return dict(objective().outputs(Bigrams(), [mask, mask], targets, 0))


def test_the_loss_is_the_sum_over_all_tokens_that_are_predicted() -> None:
    distribution = Bigrams().table.detach().log_softmax(1)
    steps = [(BOS, 5), (5, 6), (6, EOS), (BOS, 7), (7, 8), (8, 4), (4, EOS)]
    expected = -sum(float(distribution[before, after]) for before, after in steps)
    assert objective().loss(outputs(), TARGETS).item() == pytest.approx(expected, rel=1e-6)
    assert objective().weight(TARGETS) == 7


def test_smoothing_spreads_a_share_over_all_tokens() -> None:
    distribution = Bigrams().table.log_softmax(1)[TARGETS[:, :-1]]
    real = TARGETS[:, 1:] != PAD
    uniform = -distribution.mean(2)[real].sum().item()
    plain = objective().loss(outputs(), TARGETS).item()
    assert objective(0.2).loss(outputs(), TARGETS).item() == pytest.approx(0.8 * plain + 0.2 * uniform, rel=1e-6)


def test_padding_counts_nothing() -> None:
    wider = torch.nn.functional.pad(TARGETS, (0, 3))
    assert torch.allclose(objective().loss(outputs(wider), wider), objective().loss(outputs(), TARGETS))
    assert objective().weight(wider) == 7
    one, other = objective().kept(outputs(), TARGETS), objective().kept(outputs(wider), wider)
    assert all(torch.allclose(one[name], other[name]) for name in ("losses", "right"))


def test_the_report_measures_tokens_not_texts() -> None:
    kept = {name: value.detach().numpy() for name, value in objective().kept(outputs(), TARGETS).items()}
    targets = np.empty(2, object)
    targets[:] = [row[row != PAD].numpy() for row in TARGETS]
    found = objective().report(kept, targets)
    loss = objective().loss(outputs(), TARGETS).item() / 7
    guesses = outputs()["logits"].argmax(2)
    right = int(((guesses == TARGETS[:, 1:]) & (TARGETS[:, 1:] != PAD)).sum())
    assert (found.samples, found.tokens) == (2, 7)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert found.token_accuracy == pytest.approx(right / 7)
    assert [(group.shortest, group.longest, group.samples) for group in found.by_length] == [(3, 3, 1), (4, 4, 1)]
    assert sum(math.log(group.perplexity) * n for group, n in zip(found.by_length, (3, 4), strict=True)) == (
        pytest.approx(7 * loss, rel=1e-6)
    )


def test_a_report_of_a_worse_model_than_a_float_can_say(tmp_path: Path) -> None:
    targets = np.empty(1, object)
    targets[0] = np.array([BOS, EOS])
    found = objective().report({"losses": np.array([5e3], np.float32), "right": np.array([0])}, targets)
    assert math.isfinite(found.perplexity)
    found = with_translations(found, [Translated(source="a|b", reference="è", translation="e", length=1)])
    assert found.figures()["chrf"] == 0.0
    assert "| a\\|b | è | e |" in found.words()
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_targets_begin_and_end_and_what_is_cut_does_not_end() -> None:
    texts = np.array(["una pagina", "la", "la " * 40], object)
    (short, tiny, cut), how_many = written_tokens(texts, Written(SPEC, TOKENIZER))
    assert how_many == 1
    assert (short[0], short[-1], tiny[0], tiny[-1]) == (BOS, EOS, BOS, EOS)
    assert (len(cut), cut[0]) == (12, BOS)
    assert EOS not in cut
    (exact, *_), _ = written_tokens(texts, Written(TextInput(max_length=len(short)), TOKENIZER))
    assert exact.tolist() == short.tolist(), "one that just fits is whole"


def test_items_of_ragged_targets_are_padded_to_the_longest_of_the_batch() -> None:
    targets = np.empty(3, object)
    targets[:] = [np.array([BOS, 5, EOS]), np.array([BOS, EOS]), np.array([BOS, 6, 7, 8, EOS])]
    items = Items(targets, np.array([1, 2, 3]), np.arange(3), lambda rows: {"input_ids": rows[:, None]})
    batch = items.batch_targets(np.array([1, 0]))
    assert batch.dtype == np.int64
    assert batch.tolist() == [[BOS, EOS, PAD], [BOS, 5, EOS]]
    assert items.select(np.array([2, 1])).batch_targets(np.array([1])).tolist() == [[BOS, EOS]]
