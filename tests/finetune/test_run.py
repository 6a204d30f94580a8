"""Whole runs, from a data file to a published bundle."""

from __future__ import annotations

import csv
import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine

from export import bundle
from export.bundle import Manifest
from export.processing.images import decode_image
from export.processing.inputs import ImageInput, TextInput, VectorInput
from finetune.recipe import Data, Hyperparameters, Recipe, Stopping, Transfer
from finetune.run import Cancelled, JobFailed, RunRequest, run
from finetune.run_request import FileRef
from models.spec import Classification, ModelSpec
from tests.finetune.small import Recorder

QUICK = Hyperparameters(n_epochs=30, batch_size=16, learning_rate=0.01)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def file(path: Path) -> FileRef:
    return FileRef(path=path, filename=path.name, sha256=bundle.sha256_of(path).sha256, id=f"file-{path.stem}")


def table(path: Path, data: Any, names: list[str] | None = None) -> FileRef:
    """One of scikit-learn's data sets as CSV."""
    names = names or [str(name) for name in data.target_names]
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*data.feature_names, "label"])
        writer.writerows([*row, names[target]] for row, target in zip(data.data, data.target, strict=True))
    return file(path)


def request(
    folder: Path, training: FileRef, name: str = "model", job_id: str | None = "job-1", **fields: Any
) -> RunRequest:
    validation = fields.pop("validation", None)
    recipe = Recipe(**{"model": "mlp", "training_file": training.id, "seed": 3, "hyperparameters": QUICK, **fields})
    return RunRequest(
        recipe=recipe,
        training=training,
        validation=validation,
        folder=folder / f"run-{name}-{job_id}",
        repository=folder / "repository",
        name=name,
        job_id=job_id,
    )


def tensors(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    return load_file(folder / "repository" / manifest.name / str(manifest.version) / "weights.safetensors")


def answers(folder: Path, manifest: Manifest, **inputs: np.ndarray) -> list[str]:
    path = folder / "repository" / manifest.name / str(manifest.version) / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [manifest.labels[i] for i in session.run(["logits"], inputs)[0].argmax(axis=1)]


def test_from_a_table_to_a_bundle_that_answers(tmp_path: Path) -> None:
    wine, reporter = load_wine(), Recorder()
    job = request(tmp_path, table(tmp_path / "wine.csv", wine), data=Data(validation=0.2, test=0.2))
    manifest = run(job, reporter)

    folder = tmp_path / "repository" / "model" / "1"
    assert bundle.verify(folder) == manifest
    assert reporter.states == ["validating", "running", "exporting"]
    assert manifest.input == VectorInput(features=13, names=list(wine.feature_names))
    assert manifest.labels == ["class_0", "class_1", "class_2"]
    assert manifest.metrics["accuracy"] >= 0.9
    assert msgspec.convert(manifest.model, ModelSpec).task == Classification(3)
    assert manifest.lineage.training_sha256 == job.training.sha256
    assert manifest.parity.samples == pytest.approx(0.2 * 178, abs=2), "the whole validation split"
    found = answers(tmp_path, manifest, vector=wine.data.astype(np.float32))
    assert np.mean([label == f"class_{target}" for label, target in zip(found, wine.target, strict=True)]) >= 0.95
    with Image.open(folder / "training_curve.png") as picture:
        assert picture.size[0] > 400
    report = msgspec.json.decode((folder / "evaluation.json").read_bytes())
    assert report["samples"] == pytest.approx(0.2 * 178, abs=2), "the test split"
    assert report["loss"] == manifest.metrics["loss"] != manifest.metrics["validation_loss"]
    assert not (job.folder / "cache").exists()

    reporter = Recorder()
    assert run(job, reporter) == manifest, "a job that has published does not publish twice"
    assert reporter.states == []


def overfitting(folder: Path, retrain: str, name: str, reporter: Recorder, **fields: Any) -> RunRequest:
    """Breast cancer, with a network that is much too wide for it: early stopping has something to stop."""
    return request(
        folder,
        table(folder / "cancer.csv", load_breast_cancer()),
        name=name,
        model=ModelSpec(architecture="mlp", hyperparameters={"hidden": [128]}),
        stopping=Stopping(patience=3, retrain=retrain),  # type: ignore[arg-type]
        hyperparameters=Hyperparameters(n_epochs=40, batch_size=16, learning_rate=0.02),
        **{"data": Data(validation=0.3, test=0.2), **fields},
    )


def test_retraining_from_scratch_takes_the_best_number_of_steps_on_both_splits(tmp_path: Path) -> None:
    kept = run(overfitting(tmp_path, "keep", "kept", Recorder()), Recorder())
    reporter = Recorder()
    again = run(overfitting(tmp_path, "scratch", "again", reporter), reporter)
    best = msgspec.json.decode((tmp_path / "repository/again/1/training_curve.json").read_bytes())
    assert again.metrics["validation_loss"] == kept.metrics["validation_loss"]
    said = next(message for _, _, message in reporter.events if message.startswith("from the start again"))
    steps = int(said.rpartition(" for ")[2].split()[0])
    assert steps in [evaluation["step"] for evaluation in best["evaluations"]]
    assert "on all 456 items" in said
    state = tensors(tmp_path, again)
    assert not np.array_equal(state["head.weight"], tensors(tmp_path, kept)["head.weight"])
    # The statistics of the input are those of both splits now, and of the training split alone before.
    everything = load_breast_cancer().data
    assert not np.allclose(state["trunk.standardize.mean"], tensors(tmp_path, kept)["trunk.standardize.mean"])
    np.testing.assert_allclose(state["trunk.standardize.mean"], everything.mean(axis=0), rtol=0.05)
    assert again.metrics["accuracy"] > 0.93, "on the test split, which neither has seen"
    saved = sorted((tmp_path / "run-again-job-1" / "retraining").glob("step-*"))
    assert int(saved[-1].name.removeprefix("step-")) == steps


def test_retraining_goes_on_until_the_validation_loss_is_what_the_training_loss_was(tmp_path: Path) -> None:
    kept = run(overfitting(tmp_path, "keep", "kept", Recorder()), Recorder())
    reporter = Recorder()
    on = run(overfitting(tmp_path, "continue", "on", reporter), reporter)
    at = next(i for i, (_, _, message) in enumerate(reporter.events) if message.startswith("on with all 456 items"))
    below = float(reporter.events[at][2].rpartition(" ")[2])
    losses = [
        float(message.partition("validation loss ")[2].partition(",")[0])
        for _, _, message in reporter.events[at:]
        if "validation loss " in message and message.startswith("epoch")
    ]
    assert below < kept.metrics["validation_loss"]
    assert losses[-1] < below or len(losses) == 40
    assert all(loss >= below for loss in losses[:-1])
    assert on.metrics["accuracy"] > 0.93


@pytest.mark.parametrize("strategy", ["scratch", "continue"])
def test_a_retraining_that_is_cut_off_ends_with_the_same_weights(strategy: str, tmp_path: Path) -> None:
    whole = Recorder()
    expected = run(overfitting(tmp_path, strategy, "whole", whole, checkpoint_seconds=0.0), whole)
    while not list((tmp_path / "run-parts-job-1" / "retraining").glob("step-*")):
        cut = Recorder(30)
        with pytest.raises(Cancelled):
            run(overfitting(tmp_path, strategy, "parts", cut, checkpoint_seconds=0.0), cut)
    found = run(overfitting(tmp_path, strategy, "parts", Recorder(), checkpoint_seconds=0.0), Recorder())
    ours, theirs = tensors(tmp_path, found), tensors(tmp_path, expected)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_validation_file_is_for_measuring_only(tmp_path: Path) -> None:
    iris = load_iris()
    training = table(tmp_path / "iris.csv", iris)
    other = load_iris()
    other.data = np.concatenate([other.data * 100.0, other.data[:5]])
    other.target = np.concatenate([other.target, other.target[:5]])
    reporter = Recorder()
    manifest = run(request(tmp_path, training, validation=table(tmp_path / "far.csv", other)), reporter)
    state = tensors(tmp_path, manifest)
    np.testing.assert_allclose(state["trunk.standardize.mean"], iris.data.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(state["trunk.standardize.std"], iris.data.std(axis=0), rtol=1e-4)
    assert manifest.parity.samples == 155
    (leak,) = [event for event in reporter.events if event[1] == "leakage"]
    assert leak[0] == "warn"
    assert leak[2].startswith("5 of 155 validation items are in the training file")


def test_the_recorded_recipe_has_numbers_for_auto_and_gives_the_same_weights_again(tmp_path: Path) -> None:
    training = table(tmp_path / "iris.csv", load_iris())
    few = Hyperparameters(n_epochs=2)
    first = run(request(tmp_path, training, seed=None, hyperparameters=few), Recorder())
    recorded = msgspec.convert(first.lineage.recipe, Recipe)
    assert recorded.seed is not None
    assert recorded.hyperparameters == Hyperparameters(n_epochs=2, batch_size=8, learning_rate=0.0005)
    again = request(tmp_path, training, job_id="job-2")
    second = run(msgspec.structs.replace(again, recipe=recorded), Recorder())
    assert second.version == 2
    one, other = tensors(tmp_path, first), tensors(tmp_path, second)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_run_cut_off_anywhere_publishes_the_same_weights(tmp_path: Path) -> None:
    training = table(tmp_path / "iris.csv", load_iris())
    expected = run(request(tmp_path, training, name="whole"), Recorder())
    parts = request(tmp_path, training, name="parts", checkpoint_seconds=0.0)
    for question in (1, 5, 40, 90):
        with pytest.raises(Cancelled):
            run(parts, Recorder(question))
    reporter = Recorder()
    found = run(parts, reporter)
    assert "going on from the checkpoint of step" in reporter.messages()
    one, other = tensors(tmp_path, expected), tensors(tmp_path, found)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_run_cut_off_while_exporting_publishes_nothing_and_then_does_not_train_again(tmp_path: Path) -> None:
    job = request(tmp_path, table(tmp_path / "iris.csv", load_iris()))

    class WhileExporting(Recorder):
        def cancelled(self) -> bool:
            return "exporting" in self.states

    with pytest.raises(Cancelled):
        run(job, WhileExporting())
    assert bundle.names(job.repository) == []
    reporter = Recorder()
    assert run(job, reporter).version == 1
    assert reporter.reports == []


def test_another_recipe_in_the_same_folder_starts_anew(tmp_path: Path) -> None:
    training = table(tmp_path / "iris.csv", load_iris())
    job = request(tmp_path, training, checkpoint_seconds=0.0)
    changed = msgspec.structs.replace(job, recipe=msgspec.structs.replace(job.recipe, seed=4))
    steps = []
    for which in (job, changed):
        reporter = Recorder(cancel_at=20)
        with pytest.raises(Cancelled):
            run(which, reporter)
        steps.append(reporter.checkpoints[0][0])
    assert "belongs to a run with another recipe or other data" in reporter.messages()
    assert "going on" not in reporter.messages()
    assert steps == [1, 1]


def test_training_goes_on_from_a_published_model(tmp_path: Path) -> None:
    iris = load_iris()
    first = run(request(tmp_path, table(tmp_path / "iris.csv", iris), name="flowers"), Recorder())
    barely = Hyperparameters(n_epochs=1, batch_size=16, learning_rate=1e-9)
    again = request(
        tmp_path,
        table(tmp_path / "more.csv", iris),
        name="flowers",
        job_id="2",
        model="flowers:1",
        hyperparameters=barely,
    )
    second = run(again, Recorder())
    assert (second.version, second.lineage.base_model) == (2, "flowers:1")
    one, other = tensors(tmp_path, first), tensors(tmp_path, second)
    assert all(np.allclose(one[name], other[name], atol=1e-6) for name in one), "head and trunk are those of version 1"

    renamed = table(tmp_path / "renamed.csv", iris, ["a", "b", "c"])
    third = run(
        request(tmp_path, renamed, name="letters", job_id="3", model="flowers", hyperparameters=barely), Recorder()
    )
    assert third.lineage.base_model == "flowers:2"
    other = tensors(tmp_path, third)
    np.testing.assert_allclose(other["trunk.layers.0.weight"], one["trunk.layers.0.weight"], atol=1e-6)
    assert np.abs(other["head.weight"] - one["head.weight"]).max() > 0.01, "other labels, so a new head"


def test_a_published_models_own_order_of_labels_is_kept(tmp_path: Path) -> None:
    iris = load_iris()
    first = run(request(tmp_path, table(tmp_path / "iris.csv", iris), name="flowers"), Recorder())
    folder = tmp_path / "repository" / "flowers" / "1"
    backwards = msgspec.structs.replace(first, labels=first.labels[::-1])
    (folder / "manifest.json").write_bytes(msgspec.json.encode(backwards))
    job = request(tmp_path, table(tmp_path / "more.csv", iris), name="flowers", job_id="2", model="flowers")
    second = run(job, Recorder())
    assert second.labels == first.labels[::-1]
    found = answers(tmp_path, second, vector=iris.data.astype(np.float32))
    assert np.mean([label == iris.target_names[t] for label, t in zip(found, iris.target, strict=True)]) > 0.9


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"transfer": Transfer(freeze="layer9")}, r"no block 'layer9'.*hidden.0"),
        ({"model": "minilm-l6-v2"}, r"iris.csv holds table; minilm-l6-v2 learns from text"),
        ({"model": "flowers:7"}, r"flowers:7"),
        ({"model": ModelSpec(architecture="mlp", hyperparameters={"features": 9})}, r"4 columns of numbers.* 9"),
        ({"data": Data(label_column="kind")}, r"no column 'kind'"),
        ({"precision": "float16"}, r"float16 needs a CUDA device"),
    ],
)
def test_what_a_user_can_change_fails_in_words(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    if fields.get("precision") == "float16" and torch.cuda.is_available():
        pytest.skip("this machine can")
    job = request(tmp_path, table(tmp_path / "iris.csv", load_iris()), **fields)
    with pytest.raises(JobFailed, match=words):
        run(job, Recorder())
    assert bundle.names(job.repository) == []


def test_what_is_left_out_and_cut_short_is_said(tmp_path: Path) -> None:
    training = table(tmp_path / "iris.csv", load_iris())
    with training.path.open("a") as stream:
        stream.write("1,2,3,much,setosa\n")
    reporter = Recorder()
    run(request(tmp_path, file(training.path), stopping=Stopping(metric="accuracy", patience=2)), reporter)
    (problem,) = [message for _, type, message in reporter.events if type == "problem"]
    assert "152" in problem
    assert "much" in problem
    assert "stopped early after" in reporter.messages()


def digit_archive(path: Path, items: int) -> FileRef:
    digits = load_digits()
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(items):
            picture = io.BytesIO()
            Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).save(picture, "PNG")
            archive.writestr(f"{digits.target[i]}/{i}.png", picture.getvalue())
    return file(path)


@pytest.mark.slow
def test_a_convolutional_backbone_learns_images(tmp_path: Path) -> None:
    training = digit_archive(tmp_path / "digits.zip", 300)
    job = request(
        tmp_path,
        training,
        model="efficientnet-lite0",
        image_size=64,
        transfer=Transfer(freeze="all"),
        hyperparameters=Hyperparameters(n_epochs=3, batch_size=16, learning_rate=3e-3),
    )
    manifest = run(job, Recorder())
    assert manifest.input == ImageInput(height=64, width=64, resize="stretch", crop_fraction=1.0)
    assert manifest.metrics["accuracy"] > 0.5
    with zipfile.ZipFile(training.path) as archive:
        names = archive.namelist()[:100]
        pixels = np.stack([decode_image(archive.read(name), manifest.input) for name in names])
    found = answers(tmp_path, manifest, pixels=pixels)
    assert np.mean([label == name[0] for label, name in zip(found, names, strict=True)]) > 0.6


@pytest.mark.slow
def test_a_convolutional_network_learns_images_from_nothing(tmp_path: Path) -> None:
    job = request(
        tmp_path,
        digit_archive(tmp_path / "digits.zip", 1000),
        model="lenet5",
        image_size=32,
        hyperparameters=Hyperparameters(n_epochs=8, batch_size=32, learning_rate=2e-3),
    )
    manifest = run(job, Recorder())
    assert manifest.input == ImageInput(height=32, width=32, resize="stretch", crop_fraction=1.0)
    assert manifest.metrics["accuracy"] > 0.85


@pytest.mark.slow
def test_a_text_encoder_learns_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    subjects = {"food": ["soup", "bread", "apple pie", "cheese"], "weather": ["rain", "snow", "sunshine", "fog"]}
    forms = ["a day with {}", "she talked about {}", "there was much {} in town", "{} again", "we all like {}"]
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows(
            [form.format(word), label] for label, words in subjects.items() for word in words for form in forms
        )
    job = request(
        tmp_path,
        file(path),
        model="minilm-l6-v2",
        max_length=16,
        transfer=Transfer(freeze="all"),
        hyperparameters=Hyperparameters(n_epochs=5, batch_size=8),
        data=Data(validation=0.25),
    )
    manifest = run(job, Recorder())
    assert manifest.input == TextInput(max_length=16)
    assert manifest.metrics["accuracy"] >= 0.9
    assert "tokenizer.json" in manifest.files

    shutil.rmtree(job.folder)
    onwards = request(
        tmp_path, file(path), job_id="2", model="model", hyperparameters=Hyperparameters(n_epochs=1, learning_rate=1e-9)
    )
    second = run(onwards, Recorder())
    assert second.input == manifest.input
    assert second.metrics["accuracy"] >= 0.9
