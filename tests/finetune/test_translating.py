"""Networks that learn to translate: how pairs enter them, whole runs, and runs that are interrupted."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from demo.datasets import translations
from export import bundle
from export.processing.inputs import TextInput
from export.processing.text import TextProcessor
from finetune import origin, trainer
from finetune.automatic import Chosen
from finetune.data.datasets import Dataset, open_dataset
from finetune.data.wanted import wanted_of
from finetune.objectives import choice
from finetune.origin import Origin, Reading
from finetune.preprocess import Items, prepare
from finetune.recipe import Augmentation, CrossEntropy, Data, Hyperparameters, Recipe, Stopping, Translation
from finetune.run import Cancelled, JobFailed, RunRequest, run
from finetune.run_request import FileRef
from finetune.vocabulary import tokens_of
from models import spec
from models.network import Network
from models.spec import ModelSpec
from tests.finetune.small import Recorder, differing, weights

SMALL = {"vocabulary_size": 300, "width": 12, "embedding": 8}
ROWS = 60


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> FileRef:
    """The shortest of Django's English-Italian pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    whole, _ = translations(folder)
    with whole.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    path = folder / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *sorted(rows, key=lambda row: len(row[0] + row[1]))[:ROWS]])
    return FileRef(path=path, filename=path.name, sha256=bundle.sha256_of(path).sha256, id="file-pairs")


def dataset(pairs: FileRef) -> Dataset:
    return open_dataset(pairs.path, pairs.filename, Data(), wanted_of(Translation(), Data()))


def reading(data: Dataset, rows: np.ndarray | None = None, **fields: Any) -> Reading:
    start = Origin(name="seq2seq", spec=ModelSpec(architecture="seq2seq", hyperparameters=SMALL))
    recipe = Recipe(model="seq2seq", training_file="file-1", **fields)
    rows = np.arange(len(data)) if rows is None else rows
    return origin.read(start, recipe, data, rows, spec.Translation(), {})


def test_two_vocabularies_are_learned_from_the_training_split_only(tmp_path: Path) -> None:
    path = tmp_path / "colours.csv"
    rows = [f"{colour} {i},{colore} {i}\n" for i in range(10) for colour, colore in (("red", "rosso"), ("blue", "blu"))]
    path.write_text("text,translation\n" + "".join(rows))
    data = open_dataset(path, path.name, Data(), wanted_of(Translation(), Data()))
    found = reading(data, np.arange(0, 20, 2))
    assert found.tokenizer is not None
    assert found.written is not None
    assert found.input == TextInput(max_length=256, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    assert found.written.spec == msgspec.structs.replace(found.input, tokenizer="target_tokenizer.json")
    source, target = found.tokenizer.decode(), found.written.tokenizer.decode()
    assert [word in source for word in ('"red"', '"rosso"', '"blue"')] == [True, False, False]
    assert [word in target for word in ('"red"', '"rosso"', '"blu"')] == [False, True, False]
    sizes = (found.spec.hyperparameters["vocabulary"], found.spec.hyperparameters["target_vocabulary"])
    assert sizes == (tokens_of(found.tokenizer), tokens_of(found.written.tokenizer))


def test_pairs_become_what_the_network_takes(pairs: FileRef, tmp_path: Path) -> None:
    data = dataset(pairs)
    found = reading(data, max_length=12)
    assert found.written is not None
    items = prepared(data, found, tmp_path)
    batch = items.batch(np.array([3, 50]))
    assert list(batch) == ["input_ids", "attention_mask"]
    wanted = items.batch_targets(np.array([3, 50]))
    target = TextProcessor(found.written.spec, found.written.tokenizer)
    for row, item in enumerate((3, 50)):
        assert wanted[row][wanted[row] != 0].tolist() == target.encode([data.targets[item]])[0]


def prepared(data: Dataset, found: Reading, folder: Path) -> Items:
    return prepare(data, found.input, found.tokenizer, folder, lambda done, items: None, written=found.written)


def test_an_interrupted_run_ends_with_the_same_weights_bit_for_bit(pairs: FileRef, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data = dataset(pairs)
    found = reading(data)
    items = prepared(data, found, tmp_path)
    train, validation = items.select(np.arange(48)), items.select(np.arange(48, ROWS))
    recipe = Recipe(
        model="seq2seq",
        training_file="file-1",
        checkpoint_seconds=0.0,
        gradient_accumulation=2,
        augmentation=Augmentation(word_dropout=0.1),
        stopping=Stopping(metric="perplexity", patience=5),
    )
    fit = partial(
        trainer.fit,
        train=train,
        validation=validation,
        objective=choice.build(Translation(), data.answers, train.targets, found),
        recipe=recipe,
        chosen=Chosen(epochs=5, batch_size=8, learning_rate=0.01),
        seed=0,
        run="run",
    )

    def network(seed: int) -> Network:
        torch.manual_seed(seed)
        return origin.load(Origin(name="seq2seq", spec=found.spec), found.spec, data.answers, {})

    undisturbed = network(0)
    expected = fit(undisturbed, folder=tmp_path / "whole", reporter=Recorder())
    for seed, question in enumerate((3, 4, 6)):
        start = network(seed)
        with pytest.raises(Cancelled):
            fit(start, folder=tmp_path / "parts", reporter=Recorder(question))
    resumed = network(9)
    again = fit(resumed, folder=tmp_path / "parts", reporter=Recorder())
    assert differing(weights(undisturbed), weights(resumed)) == set()
    assert again == expected
    perplexities = [evaluation["validation_perplexity"] for evaluation in expected.evaluations]
    assert perplexities == sorted(perplexities, reverse=True), "it learns"


def job(pairs: FileRef, folder: Path, model: Any, name: str, **fields: Any) -> RunRequest:
    hyperparameters = Hyperparameters(n_epochs=fields.pop("epochs", 2), batch_size=16, learning_rate=0.01)
    recipe = Recipe(model=model, training_file=pairs.id, seed=1, hyperparameters=hyperparameters, **fields)
    return RunRequest(
        recipe=recipe, training=pairs, folder=folder / f"run-{name}", repository=folder / "repository", name=name
    )


@pytest.mark.slow
def test_from_pairs_to_a_bundle_and_on_from_there(pairs: FileRef, tmp_path: Path) -> None:
    model = ModelSpec(architecture="seq2seq", hyperparameters={**SMALL, "cell": "lstm", "attention": "none"})
    reporter = Recorder()
    manifest = run(job(pairs, tmp_path, model, "first"), reporter)
    folder = tmp_path / "repository" / "first" / "1"
    assert bundle.verify(folder) == manifest
    assert manifest.task == "translation"
    assert manifest.output_text == TextInput(
        max_length=256, bos_token_id=2, eos_token_id=3, tokenizer="target_tokenizer.json"
    )
    assert set(manifest.graphs) == {"decoder"}
    assert len(manifest.parity.lengths) >= 3
    assert {"loss", "perplexity", "token_accuracy", "chrf"} <= set(manifest.metrics)
    assert manifest.metrics["perplexity"] == pytest.approx(np.exp(manifest.metrics["loss"]))
    report = msgspec.json.decode((folder / "evaluation.json").read_bytes())
    assert report["translated"] == report["samples"] == manifest.parity.samples
    card = (folder / "MODEL_CARD.md").read_text()
    assert "/v1/completions" in card
    assert all(example["source"] in card for example in report["examples"])
    assert f"learns translation from {ROWS - report['samples']} items" in reporter.messages()

    again = run(job(pairs, tmp_path, "first", "second", epochs=1), Recorder())
    for name in ("tokenizer.json", "target_tokenizer.json"):
        assert again.files[name] == manifest.files[name], "it goes on with both vocabularies"
    assert again.metrics["perplexity"] < manifest.metrics["perplexity"]


def test_what_cannot_be_learned_fails_in_words(pairs: FileRef, tmp_path: Path) -> None:
    def fails(words: str, model: str = "seq2seq", **fields: Any) -> None:
        with pytest.raises(JobFailed, match=words):
            run(job(pairs, tmp_path, model, "model", **fields), Recorder())

    fails("seq2seq cannot learn by cross_entropy; it can by translation", objective=CrossEntropy())
    fails("gru cannot learn by translation", model="gru", objective=Translation())
    fails("there is no column 'label'", model="gru")
    fails("there is no column 'italian'", data=Data(translation_column="italian"))
    fails(r"does not measure chrf; it measures loss, perplexity, token_accuracy", stopping=Stopping(metric="chrf"))
