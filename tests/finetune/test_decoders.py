"""A decoder of a checkpoint learns on: in its own language, and from what it has learned here before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export.bundle import Generation, names, sha256_of
from export.processing.inputs import TextInput
from finetune.admission import Refused, admit, folder_architecture, trainable
from finetune.data.datasets import open_dataset
from finetune.data.validation import inspect
from finetune.data.wanted import wanted_of
from finetune.origin import Reading, find, load, read
from finetune.recipe import Data, Hyperparameters, NextToken, Quantization, Recipe
from finetune.run import run
from finetune.run_request import FileRef, JobFailed, RunRequest
from models.spec import LanguageModel, ModelSpec
from tests.finetune.small import Recorder
from tests.models import checkpoints
from tests.models.checkpoints import BEGIN, END, TEMPLATE, TURN
from tests.models.test_decoder_weights import FAMILIES

OBJECTIVE = NextToken()


@pytest.fixture
def small(tmp_path: Path) -> dict[str, str]:
    """The operator's own decoder."""
    checkpoints.folder(FAMILIES["llama"], tmp_path / "small")
    return {"small": str(tmp_path / "small")}


def texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"the cat sleeps {i} times"}) + "\n" for i in range(20)))
    return path


def reading_of(recipe: Recipe, folder: Path, backbones: dict[str, str]) -> Reading:
    path = texts(folder)
    dataset = open_dataset(path, path.name, Data(), wanted_of(OBJECTIVE, Data()))
    start = find(recipe.model, folder / "repository", backbones)
    return read(start, recipe, dataset, np.arange(20), LanguageModel(), backbones)


def test_texts_are_read_in_the_language_of_the_checkpoint(small: dict[str, str], tmp_path: Path) -> None:
    found = reading_of(Recipe(model="small", training_file="x", objective=OBJECTIVE, max_length=16), tmp_path, small)
    assert found.input == TextInput(max_length=16, pad_token_id=END, bos_token_id=BEGIN, eos_token_id=END)
    assert found.generation == Generation(context=64, end_token_ids=[END, TURN])
    assert found.chat_template == TEMPLATE
    start = find("small", tmp_path / "repository", small)
    assert start.beginning == "backbone"
    path = texts(tmp_path)
    answers = open_dataset(path, path.name, Data(), wanted_of(OBJECTIVE, Data())).answers
    network = load(start, found.spec, answers, small)
    expected = checkpoints.drawn(FAMILIES["llama"]).state_dict()
    state = network.state_dict()
    assert all(torch.equal(state[f"decoder.{name}"], tensor) for name, tensor in expected.items())


def test_more_than_the_decoder_reads_is_refused(small: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length: 65 tokens, but small reads at most 64"):
        reading_of(Recipe(model="small", training_file="x", objective=OBJECTIVE, max_length=65), tmp_path, small)


def test_what_a_folder_or_a_file_holds_is_known_without_reading_its_weights(
    small: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(small["small"])
    assert folder_architecture(folder) == "causal_decoder"
    assert folder_architecture(tmp_path / "other.gguf") == "causal_decoder"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    assert folder_architecture(folder) == "text_encoder"
    (folder / "config.json").unlink()
    assert folder_architecture(folder) is None
    (folder / "small.gguf").touch()
    assert folder_architecture(folder) == "causal_decoder"


def test_a_decoder_is_admitted_by_its_weights_alone(small: dict[str, str], tmp_path: Path) -> None:
    report = inspect(texts(tmp_path), "texts.jsonl")

    def admitted(model: str | ModelSpec) -> str:
        recipe = Recipe(model=model, training_file="x", suffix="tuned")
        return admit(recipe, report=report, backbones=small, repository=tmp_path, allow_hub=False)

    assert admitted("small") == "small-tuned"
    assert admitted(ModelSpec(architecture="causal_decoder", weights="small")) == "small-tuned"
    assert admitted("smollm2-135m-instruct") == "smollm2-135m-instruct-tuned"
    with pytest.raises(Refused, match="a causal_decoder needs them, its tokenizer comes with them"):
        admitted(ModelSpec(architecture="causal_decoder"))
    with pytest.raises(Refused, match="no model 'causal_decoder'"):
        admitted("causal_decoder")
    named = {one.name: one for one in trainable(small)}
    assert named["small"].objectives[0] == "next_token"
    assert named["smollm2-135m-instruct"].modality == "text"
    assert "causal_decoder" not in named


def test_only_a_language_model_is_quantized(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{label} {i}", "label": label}) + "\n" for i in range(9) for label in "ab")
    )
    report = inspect(path, path.name)
    recipe = Recipe(model="minilm-l6-v2", training_file="x", quantization=Quantization())
    with pytest.raises(Refused, match="quantization: it is judged by how a language model predicts, and cross_entropy"):
        admit(recipe, report=report, backbones={}, repository=tmp_path, allow_hub=False)


@pytest.mark.parametrize(("most_loss", "refused"), [(0.5, False), (1e-9, True)])
def test_a_run_from_a_checkpoint_publishes_what_was_judged_on_its_held_out_texts(
    most_loss: float, refused: bool, small: dict[str, str], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    path = texts(tmp_path)

    def request(model: str, name: str) -> RunRequest:
        return RunRequest(
            recipe=Recipe(
                model=model,
                training_file="x",
                objective=OBJECTIVE,
                seed=1,
                max_length=32,
                data=Data(validation=0.3),
                hyperparameters=Hyperparameters(n_epochs=2, batch_size=4, learning_rate=0.01),
                quantization=Quantization(weights="int4" if refused else "int8", most_loss=most_loss),
            ),
            training=FileRef(path=path, filename=path.name, sha256=sha256_of(path).sha256, id="x"),
            validation=None,
            folder=tmp_path / name,
            repository=tmp_path / "repository",
            name=name,
            backbones=small,
        )

    if refused:
        with pytest.raises(JobFailed, match=r"int4: perplexity on \d+ held-out tokens .* Nothing is published"):
            run(request("small", "tuned"), Recorder())
        assert names(tmp_path / "repository") == []
        return
    made = run(request("small", "tuned"), Recorder())
    assert made.generation == Generation(
        context=64, end_token_ids=[END, TURN], chat_template="chat_template.jinja", weights="int8"
    )
    assert made.input == TextInput(max_length=64, pad_token_id=END, bos_token_id=BEGIN, eos_token_id=END)
    assert made.metrics["float32_perplexity"] == pytest.approx(made.metrics["perplexity"], rel=1e-3), "PyTorch's"
    again = run(request("tuned", "more"), Recorder())
    assert again.generation == made.generation
    assert again.metrics["perplexity"] < made.metrics["perplexity"], "it went on from what it had learned"
    home = tmp_path / "repository"
    assert (home / "more/1/tokenizer.json").read_bytes() == (home / "tuned/1/tokenizer.json").read_bytes()
