"""Runs whose networks answer as one: bagging, published models joined, Monte-Carlo dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine

from export import bundle
from export.bundle import Manifest
from export.processing.answers import softmax
from finetune.bagging import Member, MemberReporter, members
from finetune.recipe import (
    Bagging,
    Data,
    Ensemble,
    Gaussian,
    Hyperparameters,
    Joined,
    McDropout,
    Recipe,
    SquaredError,
    Stopping,
)
from finetune.run import Cancelled, JobFailed, run
from models.spec import ModelSpec
from server.settings import Settings
from tests.finetune.small import Recorder
from tests.finetune.test_run import file, request, table, tensors
from tests.server.conftest import running

FEW = Hyperparameters(n_epochs=6, batch_size=16, learning_rate=0.01)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def graph(folder: Path, manifest: Manifest, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs of a published graph."""
    path = folder / "repository" / manifest.name / str(manifest.version) / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"vector": vectors.astype(np.float32)}), strict=True))


def test_bagged_members_learn_from_draws_of_their_own_and_answer_by_their_mean(tmp_path: Path) -> None:
    wine, reporter = load_wine(), Recorder()
    job = request(
        tmp_path,
        table(tmp_path / "wine.csv", wine),
        ensemble=Bagging(members=3),
        hyperparameters=FEW,
        data=Data(validation=0.2, test=0.2),
    )
    manifest = run(job, reporter)

    folder = tmp_path / "repository" / "model" / "1"
    assert bundle.verify(folder) == manifest
    assert manifest.task == "classification"
    assert {"evaluation.json", "member-03-training_curve.png", "MODEL_CARD.md"} <= set(manifest.files)
    state = tensors(tmp_path, manifest)
    means = [state[f"members.{i}.trunk.standardize.mean"] for i in range(3)]
    assert all(np.abs(means[i] - means[j]).max() > 0 for i, j in ((0, 1), (0, 2), (1, 2))), "other draws"
    assert np.abs(state["members.0.head.weight"] - state["members.1.head.weight"]).max() > 0.01

    # By hand, from the weights alone.
    def alone(i: int) -> np.ndarray:
        units = (wine.data - state[f"members.{i}.trunk.standardize.mean"]) / state[f"members.{i}.trunk.standardize.std"]
        weight, bias = (state[f"members.{i}.trunk.layers.0.{name}"] for name in ("weight", "bias"))
        units = np.maximum(units @ weight.T + bias, 0)
        return softmax(units @ state[f"members.{i}.head.weight"].T + state[f"members.{i}.head.bias"])

    found = graph(tmp_path, manifest, wine.data)
    np.testing.assert_allclose(softmax(found["logits"]), np.mean([alone(i) for i in range(3)], axis=0), atol=1e-5)
    assert found["uncertainty"].shape == (178,)
    assert manifest.metrics["members_accuracy"] > 0.5

    # Told as one run: no step comes twice, and the last is the last.
    steps = [report["step"] for report in reporter.reports]
    assert steps == sorted(steps)
    assert steps[-1] == reporter.reports[-1]["total_steps"] == reporter.reports[0]["total_steps"]
    assert "member 3 of 3: epoch 6" in reporter.messages()


@pytest.mark.parametrize("bootstrap", [True, False])
def test_a_draw_is_with_replacement_and_another_for_each_member(bootstrap: bool) -> None:
    rows = np.arange(100, 1100)
    drawn = [one.drawn(rows) for one in members(Bagging(members=4, bootstrap=bootstrap), 7)]
    assert all(len(one) == 1000 and set(one) <= set(rows) for one in drawn)
    different = [len(set(one)) for one in drawn]
    if bootstrap:
        assert all(abs(count / 1000 - (1 - 1 / np.e)) < 0.05 for count in different), "1 - 1/e of the items"
        assert len({tuple(one) for one in drawn}) == 4
    else:
        assert different == [1000] * 4
    assert len({one.seed for one in members(Bagging(members=4), 7)} | {7}) == 5


@pytest.mark.slow
def test_a_run_killed_in_its_second_member_goes_on_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    training = table(tmp_path / "iris.csv", load_iris())
    fields: dict[str, Any] = {"ensemble": Bagging(members=3), "hyperparameters": FEW, "checkpoint_seconds": 0.0}
    expected = run(request(tmp_path, training, name="whole", **fields), Recorder())
    parts = request(tmp_path, training, name="parts", **fields)
    checkpoints = parts.folder / "checkpoints"

    class InTheSecond(Recorder):
        def cancelled(self) -> bool:
            return len(list((checkpoints / "member-02").glob("step-*"))) > 1

    with pytest.raises(Cancelled):
        run(parts, InTheSecond())
    assert not (checkpoints / "member-03").exists()
    reporter = Recorder()
    found = run(parts, reporter)
    assert "member 2 of 3: going on from the checkpoint of step 2" in reporter.messages()
    assert "member 1 of 3: epoch" not in reporter.messages(), "the first is not trained again"
    one, other = tensors(tmp_path, expected), tensors(tmp_path, found)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_bagging_is_at_least_as_good_as_its_members_are_on_their_own(tmp_path: Path) -> None:
    job = request(
        tmp_path,
        table(tmp_path / "wine.csv", load_wine()),
        ensemble=Bagging(members=5),
        hyperparameters=Hyperparameters(n_epochs=3, batch_size=16, learning_rate=0.01),
        data=Data(validation=0.4),
    )
    metrics = run(job, Recorder()).metrics
    assert metrics["validation_accuracy"] >= metrics["members_accuracy"]
    # The logarithm is concave: the loss of the mean is never more than the mean of the losses (Jensen).
    assert metrics["validation_loss"] < metrics["members_loss"]


@pytest.mark.parametrize("objective", [SquaredError(), Gaussian()])
@pytest.mark.slow
def test_the_members_of_a_regression_answer_by_their_mean(objective: Any, tmp_path: Path) -> None:
    diabetes = load_diabetes()
    rows = [",".join([*diabetes.feature_names, "label"])]
    rows += [",".join(map(str, [*row, target])) for row, target in zip(diabetes.data, diabetes.target, strict=True)]
    path = tmp_path / "diabetes.csv"
    path.write_text("\n".join(rows) + "\n")
    job = request(
        tmp_path,
        file(path),
        objective=objective,
        ensemble=Bagging(members=3),
        hyperparameters=FEW,
        data=Data(validation=0.3),
    )
    manifest = run(job, Recorder())
    found = graph(tmp_path, manifest, diabetes.data)
    assert manifest.task == "regression"
    assert found["value"].shape == found["uncertainty"].shape == (442, 1)
    assert np.sqrt(np.mean((found["value"][:, 0] - diabetes.target) ** 2)) < 70, "the deviation of the targets is 77"
    assert manifest.interval is not None
    if isinstance(objective, Gaussian):
        assert (found["deviation"] > found["uncertainty"]).all(), "the members' own deviations come on top"


@pytest.mark.slow
def test_published_models_answer_as_one_without_training(tmp_path: Path) -> None:
    wine = load_wine()
    training = table(tmp_path / "wine.csv", wine)
    each = [run(request(tmp_path, training, name=f"m{i}", seed=i, hyperparameters=FEW), Recorder()) for i in range(3)]
    wide = ModelSpec(architecture="mlp", hyperparameters={"hidden": [16, 16], "activation": "tanh"})
    each.append(run(request(tmp_path, training, name="wide", model=wide, hyperparameters=FEW), Recorder()))
    answers = np.stack([softmax(graph(tmp_path, one, wine.data)["logits"]) for one in each])

    def joined(vote: str, **fields: Any) -> Manifest:
        section = Joined(models=("m1:1", "m2", "wide"), vote=vote)  # type: ignore[arg-type]
        reporter = Recorder()
        found = run(request(tmp_path, training, name=vote, model="m0", ensemble=section, **fields), reporter)
        assert reporter.reports == [], "nothing was trained"
        return found

    mean = joined("mean")
    assert mean.lineage.base_model == "m0:1, m1:1, m2:1, wide:1"
    np.testing.assert_allclose(softmax(graph(tmp_path, mean, wine.data)["logits"]), answers.mean(0), atol=1e-6)
    majority = joined("majority")
    shares = np.eye(3)[answers.argmax(-1)].mean(0)
    clear = (np.sort(answers)[..., -1] - np.sort(answers)[..., -2] > 0.01).all(0)
    found = softmax(graph(tmp_path, majority, wine.data)["logits"])
    np.testing.assert_allclose(found[clear], shares[clear], atol=1e-3)
    with Image.open(tmp_path / "repository" / "mean" / "1" / "evaluation.png") as picture:
        assert picture.size[0] > 400

    with running(Settings(home=tmp_path, port=0, worker=False)) as live:
        body = {"model": "mean", "input": wine.data[:3].tolist()}
        served = live.client.post("/v1/classify", json=body).json()["data"]
        wide = live.client.post("/v1/embeddings", json=body).json()["data"]
    for row, one in zip(answers.mean(0), served, strict=False):
        assert one["label"] == mean.labels[row.argmax()]
        assert one["probability"] == pytest.approx(row.max(), abs=1e-5)
        assert 0.0 <= one["uncertainty"] < 0.7
    assert len(wide[0]["embedding"]) == 3 * 128 + 16

    # Training goes on from an ensemble as from any other model: here by almost nothing.
    barely = Hyperparameters(n_epochs=1, batch_size=16, learning_rate=1e-9)
    onwards = run(request(tmp_path, training, name="on", model="mean:1", hyperparameters=barely), Recorder())
    np.testing.assert_allclose(softmax(graph(tmp_path, onwards, wine.data)["logits"]), answers.mean(0), atol=1e-4)


@pytest.mark.slow
def test_monte_carlo_dropout_knows_where_it_was_not_trained(tmp_path: Path) -> None:
    cancer = load_breast_cancer()
    model = ModelSpec(architecture="mlp", hyperparameters={"hidden": [32], "dropout": 0.5, "input_dropout": 0.2})
    training = table(tmp_path / "cancer.csv", cancer)
    fields: dict[str, Any] = {"model": model, "hyperparameters": FEW, "data": Data(validation=0.3)}
    manifest = run(request(tmp_path, training, ensemble=McDropout(passes=20), **fields), Recorder())
    assert manifest.metrics["accuracy"] > 0.93
    found = graph(tmp_path, manifest, cancer.data)
    again = graph(tmp_path, manifest, cancer.data[::-1])
    np.testing.assert_allclose(again["logits"][::-1], found["logits"], atol=1e-5)
    right = found["logits"].argmax(1) == np.array(
        [manifest.labels.index(cancer.target_names[t]) for t in cancer.target]
    )
    assert found["uncertainty"][~right].mean() > 3 * found["uncertainty"][right].mean()

    parts = request(tmp_path, training, name="parts", ensemble=McDropout(passes=20), checkpoint_seconds=0.0, **fields)
    with pytest.raises(Cancelled):
        run(parts, Recorder(40))
    one, other = tensors(tmp_path, manifest), tensors(tmp_path, run(parts, Recorder()))
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        (McDropout(), {}, "mlp drops nothing"),
        (Joined(models=("flowers",)), {}, "no model 'flowers' is published"),
        (Bagging(vote="majority"), {"objective": SquaredError()}, "numbers have no majority"),
        (None, {"model": "ensemble"}, "made of other networks"),
        (None, {"model": ModelSpec(architecture="mc_dropout")}, "made of other networks"),
    ],
)
def test_what_cannot_answer_as_one_fails_in_words(
    section: Ensemble | None, fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    training = table(tmp_path / "iris.csv", load_iris())
    with pytest.raises(JobFailed, match=words):
        run(request(tmp_path, training, ensemble=section, **fields), Recorder())


@pytest.mark.slow
def test_retraining_from_scratch_takes_each_member_its_own_number_of_steps(tmp_path: Path) -> None:
    reporter = Recorder()
    job = request(
        tmp_path,
        table(tmp_path / "cancer.csv", load_breast_cancer()),
        ensemble=Bagging(members=2),
        stopping=Stopping(patience=2, retrain="scratch"),
        hyperparameters=Hyperparameters(n_epochs=12, batch_size=32, learning_rate=0.02),
        data=Data(validation=0.3, test=0.2),
    )
    manifest = run(job, reporter)
    said = [message for _, _, message in reporter.events if "from the start again, on all 456 items" in message]
    assert [message.partition(":")[0] for message in said] == ["member 1 of 2", "member 2 of 2"]
    assert manifest.metrics["accuracy"] > 0.93


@pytest.mark.slow
def test_the_recorded_recipe_gives_the_same_ensemble_again(tmp_path: Path) -> None:
    training = table(tmp_path / "iris.csv", load_iris())
    job = request(tmp_path, training, ensemble=Bagging(members=2), hyperparameters=Hyperparameters(n_epochs=1))
    first = run(job, Recorder())
    recorded = msgspec.convert(first.lineage.recipe, Recipe)
    second = run(msgspec.structs.replace(job, recipe=recorded, job_id="2", folder=tmp_path / "again"), Recorder())
    one, other = tensors(tmp_path, first), tensors(tmp_path, second)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_the_time_left_is_that_of_all_members() -> None:
    recorder = Recorder()
    second = Member(seed=1, number=2, members=4)
    told = MemberReporter(recorder, second, before=100)
    told.metrics(40, total_steps=100.0, eta_seconds=6.0)
    told.metrics(100, total_steps=100.0, eta_seconds=0.0)
    assert recorder.reports == [
        {"step": 140, "total_steps": 400.0, "eta_seconds": pytest.approx(26.0), "member": 2},
        {"step": 200, "total_steps": 400.0, "eta_seconds": pytest.approx(20.0), "member": 2},
    ]
