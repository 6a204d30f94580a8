"""An encoder that has learned hidden tokens begins another task with what it knows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export import bundle
from finetune.admission import Refused, admit
from finetune.data.datasets import open_dataset
from finetune.data.validation import inspect
from finetune.data.wanted import wanted_of
from finetune.origin import find, load, read
from finetune.recipe import (
    ConfidencePenalty,
    CrossEntropy,
    Data,
    FeaturePenalty,
    Hyperparameters,
    MaskedTokens,
    NextToken,
    Objective,
    Recipe,
    Term,
)
from finetune.run import run
from finetune.run_request import FileRef, RunRequest
from models.spec import Classification, ModelSpec
from tests.finetune.small import Recorder
from tests.models.narrow import TRANSFORMER

ENCODER = ModelSpec(architecture="transformer_encoder", hyperparameters={"vocabulary_size": 300, **TRANSFORMER})


def file(path: Path, rows: list[dict[str, str]]) -> FileRef:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileRef(path=path, filename=path.name, sha256=bundle.sha256_of(path).sha256, id=path.stem)


def test_its_weights_and_its_tokenizer_are_taken_over_and_its_head_is_not(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    texts = [{"text": f"{'good' if i % 2 else 'bad'} news number {i}"} for i in range(40)]
    request = RunRequest(
        recipe=Recipe(
            model=ENCODER,
            training_file="texts",
            objective=MaskedTokens(),
            seed=1,
            hyperparameters=Hyperparameters(n_epochs=1, batch_size=8, learning_rate=0.01),
        ),
        training=file(tmp_path / "texts.jsonl", texts),
        validation=None,
        folder=tmp_path / "run",
        repository=tmp_path / "repository",
        name="read",
        job_id="job-1",
    )
    masked = run(request, Recorder())
    assert masked.task == "masked_language_model"
    assert [output.name for output in masked.outputs] == ["embedding"]
    folder = tmp_path / "repository" / "read" / "1"

    few = file(tmp_path / "few.jsonl", [{"text": f"{label} {i}", "label": label} for i in range(4) for label in "ab"])
    recipe = Recipe(model="read", training_file="few", objective=CrossEntropy())
    start = find("read", tmp_path / "repository", {})
    assert start.beginning == "learned"
    dataset = open_dataset(few.path, few.filename, Data(), wanted_of(CrossEntropy(), Data()))
    reading = read(start, recipe, dataset, np.arange(8), Classification(2), {})
    assert reading.tokenizer == (folder / "tokenizer.json").read_bytes()
    assert reading.input == masked.input
    network = load(start, reading.spec, dataset.answers, {})
    before, after = load_file(folder / "weights.safetensors"), network.state_dict()
    trunk = {name for name in after if name.startswith("trunk.")}
    assert trunk == {name for name in before if name.startswith("trunk.")}
    assert all(torch.equal(before[name], after[name]) for name in trunk)
    assert after["head.weight"].shape == (2, 16)
    assert {name for name in before if name not in trunk} == {
        "head.bias", "head.dense.bias", "head.dense.weight", "head.norm.bias", "head.norm.weight"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "objective", "rows", "field", "words"),
    [
        ("transformer_decoder", None, [{"x": "1", "label": "a"}, {"x": "2", "label": "b"}], "training_file", "holds t"),
        ("transformer_decoder", CrossEntropy(), [{"text": "a b"}], "objective", "it can by next_token"),
        ("transformer_encoder", NextToken(), [{"text": "a b"}], "objective", "cannot learn by next_token"),
        ("gru", MaskedTokens(), [{"text": "a b"}], "objective", "cannot learn by masked_tokens"),
        ("transformer_encoder", None, [{"text": "a b"}], "training_file", "no column 'label'"),
        ("transformer", None, [{"text": "a b"}], "training_file", "no column 'translation'"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_handed_in(
    tmp_path: Path, model: str, objective: Objective | None, rows: list[dict[str, str]], field: str, words: str
) -> None:
    report = inspect(file(tmp_path / "x.jsonl", rows * 3).path, "x.jsonl")
    recipe = Recipe(model=model, training_file="x", objective=objective)
    with pytest.raises(Refused, match=words) as refused:
        admit(recipe, report=report, backbones={}, repository=tmp_path, allow_hub=False)
    assert refused.value.param == field


@pytest.mark.parametrize("term", [FeaturePenalty(), ConfidencePenalty()])
def test_terms_about_a_head_are_refused_where_there_is_none(tmp_path: Path, term: Term) -> None:
    report = inspect(file(tmp_path / "x.jsonl", [{"text": "a b"}, {"text": "c"}]).path, "x.jsonl")
    recipe = Recipe(model="transformer_decoder", training_file="x", terms=(term,))
    with pytest.raises(Refused, match="is for") as refused:
        admit(recipe, report=report, backbones={}, repository=tmp_path, allow_hub=False)
    assert refused.value.param == "terms"


def test_heads_that_do_not_divide_the_width_are_refused_when_they_are_handed_in(tmp_path: Path) -> None:
    report = inspect(file(tmp_path / "x.jsonl", [{"text": "a b"}, {"text": "c"}]).path, "x.jsonl")
    model = ModelSpec(architecture="transformer_decoder", hyperparameters={"heads": 5, "width": 32})
    with pytest.raises(Refused, match="heads: 5 do not divide the width, 32") as refused:
        admit(Recipe(model=model, training_file="x"), report=report, backbones={}, repository=tmp_path, allow_hub=False)
    assert refused.value.param == "model"


@pytest.mark.parametrize(
    ("model", "objective"), [("transformer_decoder", None), ("transformer_encoder", MaskedTokens())]
)
def test_texts_without_labels_are_admitted(tmp_path: Path, model: str, objective: Objective | None) -> None:
    report = inspect(file(tmp_path / "x.jsonl", [{"text": "a b"}, {"text": "c"}]).path, "x.jsonl")
    recipe = Recipe(model=model, training_file="x", objective=objective)
    assert admit(recipe, report=report, backbones={}, repository=tmp_path, allow_hub=False) == model
