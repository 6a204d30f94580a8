"""What the networks are compared with: simple models with the same items to learn from and to be measured on."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import accuracy_score, f1_score, r2_score
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.architectures.held_out import HeldOut, Part
from export.reports.chrf import chrf

ITERATIONS = 500


def logistic_regression() -> LogisticRegression:
    return LogisticRegression(max_iter=ITERATIONS)


def logistic(items: HeldOut) -> float:
    """Accuracy of logistic regression on pixels or features, each scaled to its largest size."""
    learned, test = scaled(items)
    model = logistic_regression().fit(learned, items.learned.targets)
    return float(model.score(test, items.test.targets))


def logistic_of_first(items: HeldOut) -> float:
    """Accuracy of the same on the first of several columns of targets."""
    learned, test = scaled(items)
    model = logistic_regression().fit(learned, items.learned.targets[:, 0])
    return float(model.score(test, items.test.targets[:, 0]))


def logistic_of_each_label(items: HeldOut) -> float:
    """Macro F1 of a logistic regression for each label."""
    learned, test = scaled(items)
    model = MultiOutputClassifier(logistic_regression()).fit(learned, items.learned.targets.astype(int))
    return float(f1_score(items.test.targets.astype(int), model.predict(test), average="macro"))


def ridge(items: HeldOut) -> float:
    """R² of linear regression with a penalty that cross-validation chooses."""
    learned, test = items.learned.vectors(), items.test.vectors()
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 5, 17)))
    model.fit(learned, items.learned.targets)
    return float(r2_score(items.test.targets, model.predict(test)))


def mean(items: HeldOut) -> float:
    """R² of the mean of the items that are learned from."""
    answered = np.full_like(items.test.targets, items.learned.targets.mean())
    return float(r2_score(items.test.targets, answered))


def principal_components(items: HeldOut, code: int) -> float:
    """Share of the variance that so many principal components explain."""
    learned, test = items.learned.vectors(), items.test.vectors()
    model = PCA(code, svd_solver="full").fit(learned)
    missing = test - model.inverse_transform(model.transform(test))
    return float(1.0 - np.square(missing).sum() / np.square(test - learned.mean(axis=0)).sum())


def copy_of_source(items: HeldOut) -> float:
    """chrF of the texts as they are, as if they were translations."""
    return chrf(items.test.contents, [str(one) for one in items.test.targets])


def words(items: HeldOut) -> float:
    """Accuracy of logistic regression on the tf-idf of words."""
    model = make_pipeline(TfidfVectorizer(), logistic_regression())
    model.fit(items.learned.contents, items.learned.targets)
    return float(model.score(items.test.contents, items.test.targets))


def steps(items: HeldOut) -> float:
    """Accuracy of logistic regression on all numbers of a series, one behind the other, filled up with 0."""
    longest = max(len(one) for one in items.learned.contents)
    learned, test = flat(items.learned, longest), flat(items.test, longest)
    model = make_pipeline(StandardScaler(), logistic_regression()).fit(learned, items.learned.targets)
    return float(model.score(test, items.test.targets))


def majority(items: HeldOut) -> float:
    """Accuracy of always answering the most frequent class."""
    model = DummyClassifier().fit(items.learned.targets, items.learned.targets)
    return float(accuracy_score(items.test.targets, model.predict(items.test.targets)))


def scaled(items: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    learned, test = items.learned.vectors(), items.test.vectors()
    largest = np.abs(learned).max(axis=0)
    largest[largest == 0] = 1.0
    return learned / largest, test / largest


def flat(part: Part, longest: int) -> np.ndarray:
    """float64 [items, longest * channels]; what is longer is cut."""
    found = np.zeros((len(part.rows), longest, part.contents[0].shape[1]))
    for row, series in zip(found, part.contents, strict=True):
        row[: len(series)] = series[:longest]
    return found.reshape(len(found), -1)
