"""SMOTE: balanced classes, synthetic items between neighbours of one class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.neighbors import NearestNeighbors

from finetune.preprocess import Items
from finetune.recipe import Augmentation, Data
from finetune.run import JobFailed, run
from finetune.smote import nearest, oversample
from tests.finetune.small import Recorder
from tests.finetune.test_run import request, table


def items(vectors: np.ndarray, targets: np.ndarray) -> Items:
    vectors = vectors.astype(np.float32)
    return Items(targets.astype(np.int64), None, np.arange(len(vectors)), lambda rows: {"vector": vectors[rows]})


def test_neighbours_are_scikit_learns() -> None:
    vectors = np.unique(load_iris().data.astype(np.float32), axis=0) + 1e-3 * np.random.default_rng(0).random((149, 4))
    found = nearest(vectors, 5)
    expected = NearestNeighbors(n_neighbors=6).fit(vectors).kneighbors(vectors, return_distance=False)[:, 1:]
    assert (found == expected).mean() > 0.99


def test_rare_classes_are_filled_up_between_neighbours_of_their_own() -> None:
    iris = load_iris()
    kept = np.concatenate([np.arange(50), np.arange(50, 70), [100, 101, 102]])
    before = items(iris.data[kept], iris.target[kept])
    after = oversample(before, 3, seed=1)
    vectors = after.batch(np.arange(len(after)))["vector"]
    assert vectors.dtype == np.float32
    assert np.bincount(after.targets).tolist() == [50, 50, 50]
    np.testing.assert_array_equal(vectors[:73], before.batch(np.arange(73))["vector"])
    for label in (1, 2):
        own = iris.data[kept][iris.target[kept] == label]
        made = vectors[73:][after.targets[73:] == label]
        assert len(np.unique(made, axis=0)) > len(made) - 3
        for vector in made:
            # On the line between two originals: the way over it is no longer than the straight one.
            way = np.linalg.norm(own - vector, axis=1)
            straight = np.linalg.norm(own[:, None] - own[None], axis=2)
            over = way[:, None] + way[None] - straight
            np.fill_diagonal(over, np.inf)
            assert over.min() < 1e-4
    again = oversample(before, 3, seed=1)
    np.testing.assert_array_equal(vectors, again.batch(np.arange(len(again)))["vector"])


def test_a_class_of_one_is_repeated_and_a_class_of_none_stays_out() -> None:
    after = oversample(items(np.array([[0.0], [1.0], [2.0], [9.0]]), np.array([0, 0, 0, 2])), 5, seed=0)
    assert np.bincount(after.targets).tolist() == [3, 0, 3]
    assert set(after.batch(np.arange(3, 6))["vector"].ravel()) == {9.0}


def test_a_run_oversamples_its_training_split_only(tmp_path: Path) -> None:
    iris = load_iris()
    kept = np.concatenate([np.arange(100), np.arange(100, 120)])
    iris.data, iris.target = iris.data[kept], iris.target[kept]
    reporter = Recorder()
    job = request(
        tmp_path, table(tmp_path / "iris.csv", iris), data=Data(validation=0.2), augmentation=Augmentation(smote=5)
    )
    manifest = run(job, reporter)
    assert "from 120 items" in reporter.messages()
    assert "24 for validation" in reporter.messages()
    assert manifest.parity.samples == 24
    assert manifest.metrics["macro_f1"] > 0.85


@pytest.mark.parametrize("fields", [{"flip": 0.5}, {"word_dropout": 0.1}])
def test_an_augmentation_for_other_data_is_refused(fields: dict[str, float], tmp_path: Path) -> None:
    job = request(tmp_path, table(tmp_path / "iris.csv", load_iris()), augmentation=Augmentation(**fields))
    with pytest.raises(JobFailed, match=rf"augmentation\.{next(iter(fields))} is for (images|texts)"):
        run(job, Recorder())
