"""Reports against scikit-learn, on answers of models that know something and on awkward ones."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from export.bundle import Interval
from export.reports import binary, multi_label, regression
from export.reports.evaluation import Evaluation
from export.reports.several import SeveralReport

RANDOM = np.random.default_rng(0)


def written(report: Evaluation, folder: Path) -> str:
    """The report in all its forms: a picture, JSON, words."""
    report.plot(folder / "report.png")
    with Image.open(folder / "report.png") as picture:
        assert picture.width > 300
    found = msgspec.json.decode(msgspec.json.encode(report))
    assert found["samples"] == report.samples
    assert "loss" in report.figures()
    return report.words()


def test_a_binary_report_agrees_with_scikit_learn(tmp_path: Path) -> None:
    targets = RANDOM.integers(0, 2, 300)
    logits = (2.0 * targets - 1.0 + RANDOM.normal(scale=2.0, size=300)).round(1).astype(np.float32)  # with ties
    found = binary.evaluation(logits, targets, ["no", "yes"])
    chances = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert found.loss == pytest.approx(metrics.log_loss(targets, chances))
    assert found.accuracy == pytest.approx(metrics.accuracy_score(targets, logits > 0))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(targets, logits > 0, average="macro"))
    assert found.roc_auc == pytest.approx(metrics.roc_auc_score(targets, logits))
    assert found.average_precision == pytest.approx(metrics.average_precision_score(targets, logits))
    false, true, at = metrics.roc_curve(targets, chances, drop_intermediate=False)
    assert [one.false_positive_rate for one in found.thresholds] == pytest.approx(false[1:])
    assert [one.true_positive_rate for one in found.thresholds] == pytest.approx(true[1:])
    assert [one.threshold for one in found.thresholds] == pytest.approx(at[1:])
    by_threshold = [metrics.f1_score(targets, chances >= one) for one in np.unique(chances)]
    assert found.best.f1 == pytest.approx(max(by_threshold))
    answered = chances >= found.best.threshold
    assert metrics.f1_score(targets, answered) == pytest.approx(found.best.f1)
    assert metrics.precision_score(targets, answered) == pytest.approx(found.best.precision)
    assert "`yes`" in written(found, tmp_path)


def test_a_binary_report_on_one_label_only_has_numbers_all_the_same(tmp_path: Path) -> None:
    found = binary.evaluation(np.float32([1.0, -2.0]), np.array([1, 1]), ["no", "yes"])
    assert (found.roc_auc, found.accuracy) == (0.5, 0.5)
    assert all(np.isfinite(value) for value in found.figures().values())
    written(found, tmp_path)


def test_a_multi_label_report_agrees_with_scikit_learn(tmp_path: Path) -> None:
    targets = (RANDOM.random((200, 4)) < [0.5, 0.2, 0.05, 0.0]).astype(np.float32)
    logits = (3.0 * targets - 1.5 + RANDOM.normal(scale=1.5, size=targets.shape)).astype(np.float32)
    found = multi_label.evaluation(logits, targets, ["a", "b", "c", "never"])
    answered = logits >= 0
    precision, recall, f1, support = metrics.precision_recall_fscore_support(targets, answered, zero_division=0)
    for i, one in enumerate(found.classes):
        assert (one.precision, one.recall, one.f1) == pytest.approx((precision[i], recall[i], f1[i]))
        assert one.support == support[i]
    assert found.subset_accuracy == pytest.approx(metrics.accuracy_score(targets, answered))
    for name, average in (("micro_precision", metrics.precision_score), ("micro_recall", metrics.recall_score)):
        assert getattr(found, name) == pytest.approx(average(targets, answered, average="micro"))
    assert found.micro_f1 == pytest.approx(metrics.f1_score(targets, answered, average="micro"))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(targets[:, :3], answered[:, :3], average="macro"))
    chances = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = np.mean([metrics.log_loss(targets[:, i], chances[:, i], labels=[0, 1]) for i in range(4)])
    assert found.loss == pytest.approx(expected)
    loose = next(one for one in found.thresholds if one.threshold == 0.2)
    assert loose.f1 == pytest.approx(metrics.f1_score(targets, chances >= 0.2, average="micro"))
    assert "best micro F1" in written(found, tmp_path)


def test_a_regression_report_agrees_with_scikit_learn(tmp_path: Path) -> None:
    truth = (RANDOM.normal(size=(400, 2)) * [5.0, 0.1] + [100.0, 0.0]).astype(np.float32)
    values = (truth + RANDOM.normal(size=(400, 2)) * [2.0, 0.05]).astype(np.float32)
    conformal = Interval(method="conformal", coverage=0.95, margins=[2.0, 0.2])
    found = regression.evaluation(values, truth, ["large", "small"], 0.5, conformal)
    assert found.loss == 0.5
    assert found.mae == pytest.approx(metrics.mean_absolute_error(truth, values))
    assert found.rmse == pytest.approx(metrics.root_mean_squared_error(truth, values))
    assert found.r2 == pytest.approx(metrics.r2_score(truth, values))
    for i, one in enumerate(found.numbers):
        assert one.mae == pytest.approx(metrics.mean_absolute_error(truth[:, i], values[:, i]))
        assert one.r2 == pytest.approx(metrics.r2_score(truth[:, i], values[:, i]))
    assert found.numbers[0].coverage == pytest.approx(0.683, abs=0.06), "a normal error is within one deviation"
    assert found.numbers[0].interval_width == 4.0
    assert found.numbers[1].coverage == pytest.approx(1.0, abs=0.01)
    assert found.figures()["coverage"] == pytest.approx(np.mean([one.coverage for one in found.numbers]))
    assert "promised: 95.0 %" in written(found, tmp_path)


def test_the_interval_of_a_normal_head_is_as_wide_as_its_deviation(tmp_path: Path) -> None:
    deviations = RANDOM.uniform(0.5, 5.0, (1000, 1)).astype(np.float32)
    truth = (deviations * RANDOM.normal(size=(1000, 1))).astype(np.float32)
    gaussian = Interval(method="gaussian", coverage=0.95, margins=[1.96])
    found = regression.evaluation(np.zeros_like(truth), truth, ["noise"], 1.0, gaussian, deviations)
    assert found.coverage == pytest.approx(0.95, abs=0.02)
    assert found.numbers[0].interval_width == pytest.approx(2 * 1.96 * deviations.mean(), rel=1e-5)
    written(found, tmp_path)


def test_truths_that_are_missing_or_all_alike(tmp_path: Path) -> None:
    truth = np.float32([[1.0, 7.0], [np.nan, 7.0], [3.0, 7.0]])
    values = np.float32([[1.0, 6.0], [9.0, 7.0], [4.0, 7.0]])
    found = regression.evaluation(values, truth, ["some", "constant"], 0.0)
    assert [one.samples for one in found.numbers] == [2, 3]
    assert found.numbers[0].mae == 0.5
    assert found.numbers[1].r2 == metrics.r2_score(truth[:, 1], values[:, 1]) == 0.0
    assert found.coverage is None
    assert "coverage" not in found.figures()
    written(found, tmp_path)


def test_a_report_of_several_heads_holds_theirs(tmp_path: Path) -> None:
    truth = RANDOM.normal(size=(30, 1)).astype(np.float32)
    heads: dict[str, Evaluation] = {
        "side": binary.evaluation(RANDOM.normal(size=20).astype(np.float32), np.arange(20) % 2, ["l", "r"]),
        "size": regression.evaluation(truth * 0.9, truth, ["size"], 0.1),
    }
    found = SeveralReport(samples=40, loss=0.7, heads=heads)
    figures = found.figures()
    assert figures["loss"] == 0.7
    assert figures["side.roc_auc"] == heads["side"].figures()["roc_auc"]
    assert figures["size.mae"] == pytest.approx(0.1 * np.abs(truth).mean(), rel=1e-5)
    words = written(found, tmp_path)
    assert "Head `side`, 20 samples" in words
    assert "Head `size`, 30 samples" in words
