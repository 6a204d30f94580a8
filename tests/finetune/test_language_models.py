"""Objectives that learn from unlabelled texts: which tokens are asked for, what their loss is, how it is reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo.datasets import catalogue
from export.processing.inputs import TextInput
from export.reports.language_model import PLACES, evaluation
from finetune import trainer
from finetune.automatic import Chosen
from finetune.checkpoint import load as load_checkpoint
from finetune.data.datasets import open_dataset
from finetune.data.wanted import NOTHING
from finetune.evaluate import evaluate, figures
from finetune.objectives.masked_tokens import MaskedTokens
from finetune.objectives.next_token import NextToken
from finetune.objectives.token_prediction import TokenPrediction
from finetune.preprocess import Items, prepare
from finetune.recipe import Augmentation, Data, Recipe, Transfer
from finetune.run_request import Cancelled
from finetune.vocabulary import BOS, EOS, MASK, PAD, SPECIAL, UNASKED, token_sizes, tokens_of, train_tokenizer
from models import registry
from models.network import Network
from models.spec import LanguageModel, MaskedLanguageModel, ModelSpec
from tests.finetune.small import Recorder, differing, weights
from tests.models.narrow import TRANSFORMER

VOCABULARY = 40


def rows(lengths: list[int], seed: int = 0) -> np.ndarray:
    """Tokens of texts, [BOS] … [EOS]."""
    random = np.random.default_rng(seed)
    found = np.empty(len(lengths), object)
    for i, length in enumerate(lengths):
        found[i] = np.array([BOS, *random.integers(len(SPECIAL), VOCABULARY, length - 2), EOS], np.int64)
    return found


def items_of(texts: np.ndarray) -> Items:
    def collate(wanted: np.ndarray) -> dict[str, np.ndarray]:
        longest = max(len(texts[row]) for row in wanted) + 2
        ids = np.stack([np.pad(texts[row], (0, longest - len(texts[row]))) for row in wanted])
        return {"input_ids": ids, "attention_mask": (ids != PAD).astype(np.int64)}

    return Items(texts, np.array([len(text) for text in texts]), np.arange(len(texts)), collate, padding=UNASKED)


def batch_of(texts: np.ndarray) -> tuple[list[Tensor], Tensor]:
    items, everything = items_of(texts), np.arange(len(texts))
    inputs = [torch.from_numpy(value) for value in items.batch(everything).values()]
    return inputs, torch.from_numpy(items.batch_targets(everything))


def objective_of(kind: type[TokenPrediction], train: np.ndarray | None = None) -> TokenPrediction:
    return kind(rows([9, 5]) if train is None else train, np.ones((VOCABULARY, 2), np.int64))


def network_of(kind: type[TokenPrediction], seed: int = 0, **hyperparameters: Any) -> Network:
    torch.manual_seed(seed)
    architecture = "transformer_encoder" if kind is MaskedTokens else "transformer_decoder"
    task = MaskedLanguageModel() if kind is MaskedTokens else LanguageModel()
    sizes = {"vocabulary": VOCABULARY, **TRANSFORMER, **hyperparameters}
    return registry.build(ModelSpec(architecture=architecture, hyperparameters=sizes, task=task))


class Asked(nn.Module):
    """A model that keeps what it is asked, and knows nothing."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, asked: Tensor) -> dict[str, Tensor]:
        self.input_ids, self.asked = input_ids, asked
        return {"logits": torch.zeros(int(asked.sum()), VOCABULARY)}


def test_every_token_but_the_first_is_asked_for_at_the_place_before_it() -> None:
    inputs, targets = batch_of(rows([6, 3]))
    model, objective = Asked(), objective_of(NextToken)
    found = objective.outputs(model, inputs, targets, 0)
    assert model.asked.tolist() == [[True] * 5 + [False] * 3, [True] * 2 + [False] * 6]
    assert found["wanted"].tolist() == [*targets[0, 1:6].tolist(), *targets[1, 1:3].tolist()]
    assert objective.weight(targets) == 7
    assert objective.loss(found, targets).item() == pytest.approx(7 * math.log(VOCABULARY), rel=1e-6)


def test_a_long_text_is_read_in_parts_that_ask_for_each_token_once(tmp_path: Path) -> None:
    texts = ["short", "a text that is longer than what is read at once", "x"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dataset = open_dataset(path, path.name, Data(), NOTHING)
    tokenizer = train_tokenizer([], 300)
    spec = TextInput(max_length=12, bos_token_id=BOS, eos_token_id=EOS)
    items = prepare(dataset, spec, tokenizer, tmp_path, lambda done, total: None)
    whole = [Tokenizer.from_str(tokenizer.decode()).encode(text).ids for text in texts]
    assert items.owners is not None
    assert items.owners.tolist() == [0, 1, 1, 1, 1, 1, 2]
    for row, ids in enumerate(whole):
        parts = items.select(np.array([row]))
        found = [token for target in parts.targets for token in target[1:]]
        assert found == ids[1:]
        batch = parts.batch(np.arange(len(parts)))
        assert batch["input_ids"].shape[1] <= 12
        asked = Asked()
        inputs, targets = batch_of(parts.targets)
        assert objective_of(NextToken).outputs(asked, inputs, targets, 0)["wanted"].tolist() == ids[1:]
    both = items.select(np.array([0, 1]))
    assert len(both) == 6
    assert len(both.select(np.array([1]))) == 5, "by the items of the data set, still"


def test_two_tokens_alone_break_nothing() -> None:
    inputs, targets = batch_of(np.array([[7, 8], [9, EOS]]))
    objective = objective_of(MaskedTokens)
    found = objective.outputs(Asked(), inputs, targets, None)
    assert objective.kept(found, targets)["tokens"].sum() == objective.weight(targets) == 2


def test_masks_are_those_of_the_paper() -> None:
    texts = rows([102] * 200)
    inputs, targets = batch_of(texts)
    model, objective = Asked(), objective_of(MaskedTokens)
    torch.manual_seed(3)
    found = objective.outputs(model, inputs, targets, 0)
    asked, shown, true = model.asked, model.input_ids, inputs[0]
    assert asked.sum(1).unique().tolist() == [15], "15 in 100"
    assert objective.weight(targets) == 3000
    assert torch.equal(found["wanted"], true[asked])
    assert not asked[true == BOS].any()
    assert not asked[true == EOS].any()
    assert not asked[true == PAD].any()
    assert torch.equal(shown[~asked], true[~asked])
    assert (shown[asked] == MASK).float().mean().item() == pytest.approx(0.8, abs=0.03)
    kept = (shown == true)[asked].float().mean().item()
    assert kept == pytest.approx(0.1 + 0.1 / (VOCABULARY - len(SPECIAL)), abs=0.02)
    others = shown[asked & (shown != true) & (shown != MASK)]
    assert others.min() >= len(SPECIAL)
    assert asked.float().mean(0)[1:101].std() < 0.05, "any place alike"
    short, _ = batch_of(rows([3, 4]))
    objective.outputs(model, short, batch_of(rows([3, 4]))[1], 0)
    assert model.asked.sum(1).tolist() == [1, 1], "one at least"


def test_an_evaluation_hides_the_same_tokens_every_time_and_training_others() -> None:
    inputs, targets = batch_of(rows([30, 12]))
    model, objective = Asked(), objective_of(MaskedTokens)

    def hidden(step: int | None, seed: int) -> Tensor:
        torch.manual_seed(seed)
        objective.outputs(model, inputs, targets, step)
        return model.input_ids

    assert torch.equal(hidden(None, 1), hidden(None, 2))
    assert torch.equal(hidden(5, 1), hidden(5, 1)), "a resumed step hides what it hid"
    assert not torch.equal(hidden(5, 1), hidden(5, 2))
    torch.manual_seed(1)
    before = torch.rand(3)
    torch.manual_seed(1)
    objective.outputs(model, inputs, targets, None)
    assert torch.equal(torch.rand(3), before), "an evaluation takes nothing from the generator of the training"


@pytest.mark.parametrize("kind", [NextToken, MaskedTokens])
def test_the_loss_is_a_mean_over_tokens_whatever_the_batches(kind: type[TokenPrediction]) -> None:
    texts = rows([12, 3, 7, 30, 5])
    objective, network = objective_of(kind), network_of(kind)
    items = items_of(texts)
    found = evaluate(network, items, objective, 5, lambda: None)
    measured = figures(found, items, objective)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]), rel=1e-5)
    if kind is NextToken:
        one_by_one = evaluate(network, items, objective, 1, lambda: None)
        assert found.loss == pytest.approx(one_by_one.loss, rel=1e-5)
        logits = [network(*batch_of(texts[i : i + 1])[0])["logits"][0] for i in range(5)]
        losses = [
            nn.functional.cross_entropy(row[: len(text) - 1], torch.from_numpy(text[1:]), reduction="sum").item()
            for row, text in zip(logits, texts, strict=True)
        ]
        assert found.loss == pytest.approx(sum(losses) / (57 - 5), rel=1e-5)
        np.testing.assert_allclose(found.kept["losses"].sum(1), losses, rtol=1e-5)


def test_the_report_is_worked_out_by_hand(tmp_path: Path) -> None:
    train = np.empty(1, object)
    train[0] = np.array([BOS, 7, 7, 8, EOS], np.int64)
    sizes = np.zeros((VOCABULARY, 2), np.int64)
    sizes[7], sizes[8] = (2, 1), (3, 3)
    objective = NextToken(train, sizes)
    assert objective.usual == 7
    targets = torch.tensor([[BOS, 7, 8, EOS]])
    logits = torch.zeros(3, VOCABULARY)
    logits[0, 7] = 5.0  # right
    outputs = {
        "logits": logits,
        "wanted": targets[0, 1:],
        "row": torch.zeros(3, dtype=torch.long),
        "place": torch.arange(3),
    }
    kept = {name: value.numpy() for name, value in objective.kept(outputs, targets).items()}
    report = objective.report(kept, np.zeros(1))
    first = -math.log(math.exp(5) / (math.exp(5) + VOCABULARY - 1))
    loss = first + 2 * math.log(VOCABULARY)
    assert report.tokens == 3
    assert report.loss == pytest.approx(loss / 3, rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(loss / 3), rel=1e-5)
    assert report.bits_per_byte == pytest.approx(loss / math.log(2) / 5, rel=1e-5)
    assert report.bits_per_character == pytest.approx(loss / math.log(2) / 4, rel=1e-5)
    assert report.token_accuracy == pytest.approx(1 / 3)
    assert report.unigram_accuracy == pytest.approx(1 / 3)
    shares = [(count + 1) / (4 + VOCABULARY) for count in (2, 1, 1)]
    assert report.unigram_perplexity == pytest.approx(math.prod(shares) ** (-1 / 3), rel=1e-5)
    assert [(p.first, p.last, p.tokens) for p in report.places] == [(1, 1, 1), (2, 3, 2)]
    assert report.places[0].loss == pytest.approx(first, rel=1e-4)
    assert objective_of(MaskedTokens).report(kept, np.zeros(1)).bits_per_byte is None
    report.plot(tmp_path / "evaluation.png")
    with Image.open(tmp_path / "evaluation.png") as picture:
        assert picture.size[0] > 400
    assert "| perplexity |" in report.words()


def test_a_place_far_behind_is_the_last() -> None:
    sums = {name: np.zeros((1, PLACES)) for name in ("tokens", "losses")}
    sums["tokens"][0, PLACES - 1] = 1.0
    sums |= {name: np.ones(1) for name in ("right", "usual", "unigram", "bytes", "characters")}
    assert evaluation(sums, True).places[0].last == 2**PLACES - 1


def test_tokens_have_the_size_of_their_bytes_and_characters() -> None:
    texts = ["Größe und Länge 🎉, naïve café", "Größe 日本語", "naïve Länge\tund\n"] * 3
    tokenizer = train_tokenizer(texts, 300)
    sizes = token_sizes(tokenizer)
    assert sizes.shape == (tokens_of(tokenizer), 2)
    assert not sizes[: len(SPECIAL)].any()
    for text in texts:
        ids = Tokenizer.from_str(tokenizer.decode()).encode(text).ids
        assert sizes[ids].sum(0).tolist() == [len(text.encode()), len(text)]


def trained(kind: type[TokenPrediction], folder: Path, reporter: Recorder, **recipe: Any) -> tuple[Network, Any]:
    torch.set_num_threads(1)
    texts = rows([4 + i % 9 for i in range(40)])
    items = items_of(texts)
    network = network_of(kind)
    result = trainer.fit(
        network,
        items.select(np.arange(32)),
        items.select(np.arange(32, 40)),
        objective_of(kind, texts),
        Recipe(model="small", training_file="small", **{"checkpoint_seconds": 0.0, **recipe}),
        Chosen(epochs=3, batch_size=8, learning_rate=0.01),
        seed=1,
        run="run",
        folder=folder,
        reporter=reporter,
    )
    return network, result


@pytest.mark.parametrize("kind", [NextToken, MaskedTokens])
def test_a_resumed_run_is_the_same_in_every_bit_and_norms_are_known_by_block(
    kind: type[TokenPrediction], tmp_path: Path
) -> None:
    whole, result = trained(kind, tmp_path / "whole", Recorder())
    with pytest.raises(Cancelled):
        trained(kind, tmp_path / "killed", Recorder(cancel_at=8))
    found = load_checkpoint(tmp_path / "killed", "run", lambda why: None)
    assert found is not None
    assert 0 < found.progress.step < result.steps
    again, resumed = trained(kind, tmp_path / "killed", Recorder())
    assert differing(weights(whole), weights(again)) == set()
    assert resumed.evaluations == result.evaluations
    blocks = {"tokens", "layer0", "layer1"} | ({"head"} if kind is MaskedTokens else set())
    assert set(result.gradient_norms[0].norms) == blocks
    assert all(norm > 0 for norm in result.gradient_norms[0].norms.values())


@pytest.mark.parametrize("kind", [NextToken, MaskedTokens])
def test_other_precisions_and_words_that_are_left_out(kind: type[TokenPrediction], tmp_path: Path) -> None:
    augmentation = Augmentation(word_dropout=0.2)
    _, result = trained(kind, tmp_path, Recorder(), precision="bfloat16", augmentation=augmentation)
    assert result.best_metrics["loss"] < math.log(VOCABULARY) + 1


def test_layers_are_frozen_one_by_one(tmp_path: Path) -> None:
    before = weights(network_of(NextToken))
    after, _ = trained(NextToken, tmp_path, Recorder(), transfer=Transfer(freeze="layer0"))
    changed = differing(before, weights(after))
    assert changed
    assert all(name.startswith(("stack.layers.1.", "stack.norm.")) for name in changed)


def test_a_decoder_learns_a_language(tmp_path: Path) -> None:
    """Sentences of a catalogue: better than the frequencies of its tokens, and best where much has been read."""
    texts = sorted({text for _, text in catalogue("it") if len(text) < 90})[:300]
    tokenizer = train_tokenizer(texts, 300)
    sizes = token_sizes(tokenizer)
    tokens = np.empty(len(texts), object)
    for i, encoding in enumerate(Tokenizer.from_str(tokenizer.decode()).encode_batch(texts)):
        tokens[i] = np.array(encoding.ids, np.int64)
    items = items_of(tokens)
    network = network_of(NextToken, vocabulary=len(sizes), width=32)
    objective = NextToken(tokens[:250], sizes)
    torch.set_num_threads(1)
    trainer.fit(
        network,
        items.select(np.arange(250)),
        held_out := items.select(np.arange(250, 300)),
        objective,
        Recipe(model="small", training_file="small"),
        Chosen(epochs=8, batch_size=16, learning_rate=0.01),
        seed=1,
        run="run",
        folder=tmp_path,
        reporter=Recorder(),
    )
    report = objective.report(evaluate(network, held_out, objective, 50, lambda: None).kept, held_out.targets)
    assert report.perplexity < 0.75 * report.unigram_perplexity
    assert report.token_accuracy > 1.5 * report.unigram_accuracy
    assert report.bits_per_byte is not None
    assert report.bits_per_byte < 4.0
