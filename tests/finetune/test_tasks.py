"""Whole runs for every kind of head, over tables, images, texts and series."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris

from export.bundle import Manifest
from finetune import recipe
from finetune.recipe import Data, Head, Hyperparameters, Stopping
from finetune.run import JobFailed, run
from finetune.run_request import FileRef
from models.spec import ModelSpec
from tests.finetune.data.made import png
from tests.finetune.small import Recorder
from tests.finetune.test_run import Cancelled, file, request, table, tensors

QUICK = Hyperparameters(n_epochs=25, batch_size=32, learning_rate=0.01)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def csv_file(path: Path, columns: dict[str, Any]) -> FileRef:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return file(path)


def jsonl_file(path: Path, rows: list[dict[str, Any]]) -> FileRef:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file(path)


def answered(folder: Path, manifest: Manifest, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    path = folder / "repository" / manifest.name / str(manifest.version) / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def diabetes(path: Path, **more: np.ndarray) -> FileRef:
    found = load_diabetes()
    columns = dict(zip(found.feature_names, found.data.T, strict=True))
    return csv_file(path, {**columns, "progression": found.target, **more})


SMALL = ModelSpec(architecture="mlp", hyperparameters={"hidden": [16]})


def test_a_regression_with_a_deviation_of_each_answer(tmp_path: Path) -> None:
    manifest = run(
        request(
            tmp_path,
            diabetes(tmp_path / "diabetes.csv", doubled=2 * load_diabetes().target + 1000),
            model=SMALL,
            objective=recipe.Gaussian(),
            data=Data(target_columns=("progression", "doubled"), validation=0.2, test=0.2),
            stopping=Stopping(patience=6),
            hyperparameters=QUICK,
        ),
        Recorder(),
    )
    assert (manifest.task, manifest.labels) == ("regression", ["progression", "doubled"])
    assert manifest.interval is not None
    assert manifest.interval.method == "gaussian"
    assert [output.name for output in manifest.outputs] == ["value", "deviation", "embedding"]
    assert manifest.metrics["r2"] > 0.3
    assert 0.85 <= manifest.metrics["coverage"] <= 1.0
    found = answered(tmp_path, manifest, vector=load_diabetes().data.astype(np.float32))
    assert np.corrcoef(found["value"].T)[0, 1] > 0.97
    assert 1150.0 < found["value"][:, 1].mean() < 1450.0
    assert 25.0 < found["deviation"][:, 0].mean() < 80.0, "in the data's units, of which the whole deviation is 77"
    report = msgspec.json.decode((tmp_path / "repository/model/1/evaluation.json").read_bytes())
    assert [one["name"] for one in report["numbers"]] == ["progression", "doubled"]
    card = (tmp_path / "repository/model/1/MODEL_CARD.md").read_text()
    assert "a regression of 2 numbers" in card
    assert "1.96 deviations" in card
    assert "/v1/predict" in card


def test_an_interval_from_held_out_errors_is_measured_on_others(tmp_path: Path) -> None:
    training = diabetes(tmp_path / "diabetes.csv")
    fields: dict[str, Any] = {
        "model": SMALL,
        "objective": recipe.SquaredError(),
        "data": Data(label_column="progression", validation=0.25, test=0.25),
        "hyperparameters": QUICK,
    }
    manifest = run(request(tmp_path, training, **fields), Recorder())
    assert manifest.interval is not None
    assert manifest.interval.method == "conformal"
    assert 80.0 < manifest.interval.margins[0] < 160.0
    assert manifest.metrics["coverage"] == pytest.approx(0.95, abs=0.06)
    # Of a network that has learned the held-out items, too, their errors say nothing.
    fields["stopping"] = Stopping(patience=3, retrain="scratch")
    again = run(request(tmp_path, training, name="again", **fields), Recorder())
    assert again.interval is None
    assert "coverage" not in again.metrics


def test_too_few_held_out_items_give_no_interval_and_say_so(tmp_path: Path) -> None:
    columns = {"x": range(60), "label": [3.0 * i for i in range(60)]}
    reporter = Recorder()
    manifest = run(
        request(tmp_path, csv_file(tmp_path / "line.csv", columns), objective=recipe.AbsoluteError()), reporter
    )
    assert manifest.interval is None
    assert "6 validation items are too few" in reporter.messages()


def test_two_classes_by_one_sigmoid_unit(tmp_path: Path) -> None:
    cancer = load_breast_cancer()
    manifest = run(
        request(
            tmp_path,
            table(tmp_path / "cancer.csv", cancer),
            objective=recipe.BinaryCrossEntropy(positive_weight=2.0),
            data=Data(test=0.2),
            hyperparameters=Hyperparameters(n_epochs=8, batch_size=32, learning_rate=0.01),
        ),
        Recorder(),
    )
    assert (manifest.task, manifest.labels) == ("binary", ["benign", "malignant"])
    assert manifest.outputs[0].shape == ["batch", 1]
    assert manifest.metrics["accuracy"] > 0.93
    assert manifest.metrics["roc_auc"] > 0.97
    logits = answered(tmp_path, manifest, vector=cancer.data.astype(np.float32))["logits"][:, 0]
    malignant = np.array([str(cancer.target_names[target]) == "malignant" for target in cancer.target])
    assert np.mean((logits > 0) == malignant) > 0.95


def test_sets_of_labels_of_texts(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = {"sport": "the team won a match", "money": "the bank raised rates", "weather": "rain falls in the north"}
    rows = []
    for i in range(120):
        labels = [label for label in words if random.random() < 0.5]
        rows.append({"text": " and ".join([*(words[label] for label in labels), f"note {i}"]), "label": labels})
    manifest = run(
        request(
            tmp_path,
            jsonl_file(tmp_path / "notes.jsonl", rows),
            model=ModelSpec(
                architecture="convnet1d", hyperparameters={"width": 16, "embedding": 16, "vocabulary_size": 300}
            ),
            objective=recipe.MultiLabel(),
            hyperparameters=Hyperparameters(n_epochs=12, batch_size=16, learning_rate=0.01),
            stopping=Stopping(metric="subset_accuracy", patience=5),
        ),
        Recorder(),
    )
    assert (manifest.task, manifest.labels) == ("multi_label", ["money", "sport", "weather"])
    assert manifest.metrics["micro_f1"] > 0.9
    assert "any number of 3 labels" in (tmp_path / "repository/model/1/MODEL_CARD.md").read_text()


def irises(path: Path) -> FileRef:
    """The species, whether a petal is wide, and the length of the petal; a third of the cells are empty."""
    iris = load_iris()
    random = np.random.default_rng(0)

    def some(values: Any) -> list[Any]:
        return ["" if random.random() < 0.33 else value for value in values]

    return csv_file(
        path,
        {
            "sepal_length": iris.data[:, 0],
            "sepal_width": iris.data[:, 1],
            "petal_width": iris.data[:, 3],
            "species": some(iris.target_names[iris.target]),
            "wide": some(np.where(iris.data[:, 3] > 1.0, "yes", "no")),
            "petal_length": some(iris.data[:, 2]),
        },
    )


IRISES = recipe.MultiTask(
    heads={
        "species": Head(),
        "wide": Head(objective=recipe.BinaryCrossEntropy(), weight=0.5),
        "length": Head(objective=recipe.Gaussian(), columns=("petal_length",), weight=2.0),
    }
)


def test_several_heads_on_one_trunk_with_empty_cells(tmp_path: Path) -> None:
    training = irises(tmp_path / "irises.csv")
    fields: dict[str, Any] = {
        "objective": IRISES,
        "data": Data(validation=0.2, test=0.2),
        "stopping": Stopping(metric="length.rmse", patience=10),
        "hyperparameters": QUICK,
    }
    reporter = Recorder()
    manifest = run(request(tmp_path, training, **fields), reporter)
    assert manifest.task == "multi_task"
    assert manifest.heads["species"].labels == ["setosa", "versicolor", "virginica"]
    assert manifest.heads["wide"].task == "binary"
    assert manifest.heads["length"].interval is not None
    assert manifest.input.names == ["sepal_length", "sepal_width", "petal_width"]  # type: ignore[union-attr]
    assert manifest.metrics["species.accuracy"] > 0.75
    assert manifest.metrics["wide.accuracy"] > 0.9
    assert manifest.metrics["length.r2"] > 0.8
    names = [output.name for output in manifest.outputs]
    assert names == ["logits_species", "logits_wide", "value_length", "deviation_length", "embedding"]
    iris = load_iris()
    found = answered(tmp_path, manifest, vector=iris.data[:, [0, 1, 3]].astype(np.float32))
    assert np.corrcoef(found["value_length"][:, 0], iris.data[:, 2])[0, 1] > 0.95
    card = (tmp_path / "repository/model/1/MODEL_CARD.md").read_text()
    assert "## Head `length`: regression" in card

    # Cut off and taken up again, it ends with the same weights.
    with pytest.raises(Cancelled):
        run(request(tmp_path, training, name="parts", checkpoint_seconds=0.0, **fields), Recorder(40))
    again = run(request(tmp_path, training, name="parts", checkpoint_seconds=0.0, **fields), Recorder())
    ours, theirs = tensors(tmp_path, again), tensors(tmp_path, manifest)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("retrain", ["scratch", "continue"])
def test_several_heads_learn_from_the_validation_split_too(
    tmp_path: Path, retrain: Literal["scratch", "continue"]
) -> None:
    manifest = run(
        request(
            tmp_path,
            irises(tmp_path / "irises.csv"),
            objective=IRISES,
            data=Data(validation=0.2, test=0.2),
            stopping=Stopping(metric="length.rmse", patience=10, retrain=retrain),
            hyperparameters=QUICK,
        ),
        Recorder(),
    )
    assert manifest.metrics["wide.accuracy"] > 0.85
    assert manifest.heads["length"].interval is not None, "a Gaussian head brings its own"


def test_a_head_that_no_held_out_item_has_a_label_for_is_refused(tmp_path: Path) -> None:
    rare = [1.5 if i == 0 else "" for i in range(40)]
    columns = {"x": range(40), "kind": ["a", "b"] * 20, "rare": rare}
    objective = recipe.MultiTask(heads={"kind": Head(), "rare": Head(objective=recipe.SquaredError())})
    with pytest.raises(JobFailed, match=r"head 'rare': none of the .* items has a label for it"):
        run(request(tmp_path, csv_file(tmp_path / "rare.csv", columns), objective=objective), Recorder())


def test_another_head_on_a_published_trunk_starts_with_the_scale_of_its_targets(tmp_path: Path) -> None:
    classes = run(request(tmp_path, table(tmp_path / "iris.csv", load_iris()), name="species"), Recorder())
    iris = load_iris()
    columns = {**dict(zip(iris.feature_names, iris.data.T, strict=True)), "label": 1e4 + 100.0 * iris.data[:, 2]}
    manifest = run(
        request(
            tmp_path,
            csv_file(tmp_path / "lengths.csv", columns),
            name="lengths",
            model="species",
            objective=recipe.SquaredError(),
            hyperparameters=Hyperparameters(n_epochs=10, batch_size=16, learning_rate=0.01),
        ),
        Recorder(),
    )
    assert manifest.lineage.base_model == f"species:{classes.version}"
    assert manifest.metrics["r2"] > 0.9


def test_numbers_from_images_and_from_series(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(60)]
    shades = random.integers(0, 200, 60)
    with zipfile.ZipFile(tmp_path / "shades.zip", "w") as archive:
        archive.writestr(
            "table.csv", "image,shade\n" + "".join(f"{n},{s}\n" for n, s in zip(names, shades, strict=True))
        )
        for i, name in enumerate(names):
            archive.writestr(name, shaded(i, int(shades[i])))
    images = run(
        request(
            tmp_path,
            file(tmp_path / "shades.zip"),
            name="shades",
            model=ModelSpec(architecture="lenet5", hyperparameters={"image_size": 16}),
            objective=recipe.SquaredError(),
            data=Data(label_column="shade", validation=0.2),
            hyperparameters=Hyperparameters(n_epochs=25, batch_size=16, learning_rate=0.005),
        ),
        Recorder(),
    )
    assert images.metrics["r2"] > 0.8

    rows = []
    for _ in range(150):
        steps = random.normal(size=int(random.integers(5, 12)))
        rows.append(
            {"series": steps.round(3).tolist(), "mean": float(steps.mean()), "rising": str(steps[-1] > steps[0])}
        )
    series = run(
        request(
            tmp_path,
            jsonl_file(tmp_path / "walks.jsonl", rows),
            name="walks",
            model=ModelSpec(architecture="gru", hyperparameters={"width": 16}),
            objective=recipe.MultiTask(
                heads={
                    "mean": Head(objective=recipe.AbsoluteError()),
                    "rising": Head(objective=recipe.BinaryCrossEntropy()),
                }
            ),
            data=Data(validation=0.2),
            hyperparameters=Hyperparameters(n_epochs=15, batch_size=16, learning_rate=0.02),
        ),
        Recorder(),
    )
    assert series.metrics["mean.r2"] > 0.7
    assert len(series.parity.lengths) >= 3


def shaded(seed: int, shade: int) -> bytes:
    """A PNG of noise around a shade."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(png(seed, size=16))) as noise:
        pixels = np.asarray(noise) // 5 + shade
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()
