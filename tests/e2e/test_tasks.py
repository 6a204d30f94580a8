"""Heads of every kind go the whole path: uploaded, trained by a job, exported, asked over HTTP."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from demo.datasets import catalogue
from tests.e2e.conftest import published
from tests.server.conftest import Live

pytestmark = pytest.mark.slow

SMALL = {"architecture": "mlp", "hyperparameters": {"hidden": [16]}}


def ask(live: Live, route: str, model: str, given: Any, **more: Any) -> list[dict[str, Any]]:
    response = live.client.post(f"/v1/{route}", json={"model": model, "input": given, **more})
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["data"]
    return found


def rows_of(data: Any, **columns: Any) -> list[dict[str, Any]]:
    """A row an item: the features of a data set by their names, and more columns; None leaves a cell out."""
    found = []
    for i, vector in enumerate(data.data.tolist()):
        more = {name: values[i] for name, values in columns.items()}
        found.append(dict(zip(data.feature_names, vector, strict=True)) | more)
    return found


def test_a_regression_with_intervals(live: Live) -> None:
    diabetes = load_diabetes()
    rows = rows_of(diabetes, progression=diabetes.target.tolist())
    manifest = published(
        live,
        rows[100:],
        name="progression",
        model=SMALL,
        objective={"type": "gaussian"},
        data={"label_column": "progression", "validation": 0.2},
        stopping={"metric": "loss", "patience": 6},
        hyperparameters={"n_epochs": 60, "batch_size": 32, "learning_rate": 0.01},
    )
    assert manifest.task == "regression"
    found = ask(live, "predict", "progression", diabetes.data[:100].tolist())
    values = [one["values"]["progression"] for one in found]
    linear = LinearRegression().fit(diabetes.data[100:], diabetes.target[100:]).predict(diabetes.data[:100])
    assert r2_score(diabetes.target[:100], values) > r2_score(diabetes.target[:100], linear) - 0.1
    ranges = [one["interval"]["progression"] for one in found]
    inside = [r["low"] <= truth <= r["high"] for r, truth in zip(ranges, diabetes.target, strict=False)]
    assert 0.85 <= np.mean(inside) <= 1.0
    widths = [r["high"] - r["low"] for r in ranges]
    assert max(widths) > 1.1 * min(widths), "each answer has an interval of its own"
    raw = live.client.post(
        "/v1/predict?model=progression",
        content=diabetes.data[:3].astype("<f4").tobytes(),
        headers={"content-type": "application/octet-stream"},
    ).json()["data"]
    assert [one["values"] for one in raw] == [pytest.approx(one["values"], rel=1e-5) for one in found[:3]]


def test_two_classes_by_one_unit(live: Live) -> None:
    cancer = load_breast_cancer()
    names = [str(cancer.target_names[target]) for target in cancer.target]
    published(
        live,
        rows_of(cancer, label=names)[100:],
        name="tumours",
        model=SMALL,
        objective={"type": "binary_cross_entropy"},
        hyperparameters={"n_epochs": 8, "batch_size": 32, "learning_rate": 0.01},
    )
    found = ask(live, "classify", "tumours", cancer.data[:100].tolist())
    assert np.mean([one["label"] == name for one, name in zip(found, names, strict=False)]) > 0.92
    assert all(sum(top["probability"] for top in one["top"]) == pytest.approx(1.0) for one in found)


def test_sets_of_labels_of_texts(live: Live) -> None:
    """Messages of Django's catalogues in two languages, alone and together: each language that occurs is a label."""
    texts = {
        language: sorted({text for _, text in catalogue(language) if 20 < len(text) < 60})[:120]
        for language in ("de", "it")
    }
    rows: list[dict[str, Any]] = []
    for german, italian in zip(texts["de"], texts["it"], strict=True):
        rows += [{"text": german, "label": ["de"]}, {"text": italian, "label": ["it"]}]
        rows.append({"text": f"{german} {italian}", "label": ["de", "it"]})
    held_out = rows[:30]
    published(
        live,
        rows[30:],
        name="tongues",
        model={
            "architecture": "convnet1d",
            "hyperparameters": {"vocabulary_size": 600, "width": 32, "embedding": 32, "windows": [2, 3]},
        },
        max_length=80,
        objective={"type": "multi_label"},
        hyperparameters={"n_epochs": 8, "batch_size": 16, "learning_rate": 0.005},
    )
    found = ask(live, "classify", "tongues", [row["text"] for row in held_out])
    assert np.mean([one["labels"] == row["label"] for one, row in zip(found, held_out, strict=True)]) > 0.75
    everything = ask(live, "classify", "tongues", held_out[0]["text"], threshold=0.0)[0]
    assert everything["labels"] == ["de", "it"] == list(everything["probabilities"])


def test_several_heads_with_empty_cells(live: Live) -> None:
    iris = load_iris()
    order = np.random.default_rng(0).permutation(150)
    iris.data, iris.target = iris.data[order], iris.target[order]
    species = [str(iris.target_names[target]) if i % 3 else None for i, target in enumerate(iris.target)]
    lengths = [float(row[2]) if i % 4 else None for i, row in enumerate(iris.data)]
    iris.data, iris.feature_names = iris.data[:, [0, 1, 3]], ["sepal_length", "sepal_width", "petal_width"]
    manifest = published(
        live,
        rows_of(iris, species=species, length=lengths)[30:],
        name="irises",
        model=SMALL,
        objective={
            "type": "multi_task",
            "heads": {"species": {}, "length": {"objective": {"type": "squared_error"}, "weight": 2.0}},
        },
        data={"validation": 0.25},
        hyperparameters={"n_epochs": 40, "batch_size": 16, "learning_rate": 0.01},
    )
    assert manifest.heads["length"].interval is not None
    found = ask(live, "predict", "irises", iris.data[:30].tolist(), top_k=1)
    told = [one["heads"]["species"]["label"] for one in found]
    assert np.mean([label == iris.target_names[target] for label, target in zip(told, iris.target, strict=False)]) > 0.7
    truth = load_iris().data[order][:30, 2]
    assert r2_score(truth, [one["heads"]["length"]["values"]["length"] for one in found]) > 0.8
    inside = [
        one["heads"]["length"]["interval"]["length"]["low"]
        <= length
        <= one["heads"]["length"]["interval"]["length"]["high"]
        for one, length in zip(found, truth, strict=True)
    ]
    assert np.mean(inside) > 0.8
    listed = {one["id"]: one for one in live.client.get("/v1/models").json()["data"]}
    assert listed["irises"]["task"] == "multi_task"
    assert listed["irises"]["metrics"]["length.mae"] > 0.0


def test_a_domain_is_adapted_to_from_unlabelled_texts(live: Live) -> None:
    """Two languages in small letters, to be told apart in capitals, of which no label is known."""
    texts = {
        language: sorted({text for _, text in catalogue(language) if 20 < len(text) < 60})[:100]
        for language in ("de", "it")
    }
    rows = [{"text": text.lower(), "label": language} for language, found in texts.items() for text in found]
    other = "".join(f'{{"text": {json.dumps(text.upper())}}}\n' for found in texts.values() for text in found)
    file_id = live.file_id("capitals.jsonl", other.encode())
    manifest = published(
        live,
        rows,
        name="letters",
        model={
            "architecture": "convnet1d",
            "hyperparameters": {"vocabulary_size": 400, "width": 16, "embedding": 16, "windows": [2, 3]},
        },
        max_length=80,
        terms=[{"type": "coral", "file": file_id, "weight": 10.0}, {"type": "confidence", "weight": 0.05}],
        hyperparameters={"n_epochs": 4, "batch_size": 16, "learning_rate": 0.005},
    )
    assert len(manifest.lineage.unlabelled_sha256) == 1
    assert manifest.metrics["accuracy"] > 0.8
    assert live.client.delete(f"/v1/files/{file_id}").status_code == 200, "once the job is done nobody needs it"
