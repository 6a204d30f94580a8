"""A graph's outputs to what a client reads."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

# Classes up to which Python's own sorting is quicker than NumPy's.
FEW = 32


class Prediction(msgspec.Struct, frozen=True):
    """A label, the logit it names, and its probability from 0 to 1."""

    label: str
    index: int
    probability: float


def softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [..., classes] to probabilities of the same shape; the largest is taken off first: no overflow."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: np.ndarray = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return shares


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """float32 [...] to probabilities of the same shape; the exponent is never positive: no overflow."""
    small = np.exp(-np.abs(logits))
    shares: np.ndarray = np.where(logits >= 0, 1.0, small) / (1.0 + small)
    return shares


def probabilities(task: str, logits: np.ndarray) -> np.ndarray:
    """Of each label: those of classes add up to 1, those of a set of labels stand for themselves.

    logits: float32 [batch, labels]; [batch, 1] of a binary head, which gives [batch, 2].
    """
    match task:
        case "classification":
            return softmax(logits)
        case "binary":
            return sigmoid(np.concatenate([-logits, logits], axis=-1))
        case "multi_label":
            return sigmoid(logits)
    raise ValueError(f"a head of task {task} has no probabilities")


def label_set(probabilities: np.ndarray, labels: Sequence[str], threshold: float) -> list[str]:
    """The labels whose probability of float32 [labels] is at least `threshold`."""
    return [label for label, probability in zip(labels, probabilities, strict=True) if probability >= threshold]


def top_k(probabilities: np.ndarray, labels: Sequence[str], k: int) -> list[Prediction]:
    """The k most probable of float32 [classes], most probable first; equal ones in the order of the classes."""
    shares: list[float] = probabilities.tolist()
    if len(shares) <= FEW:
        best = sorted(range(len(shares)), key=shares.__getitem__, reverse=True)[:k]
    elif k < len(shares) // 2:  # those that are no less than the k-th, however many are equal to it
        kth = np.partition(probabilities, -k)[-k]
        candidates = np.flatnonzero(probabilities >= kth)
        best = candidates[(-probabilities[candidates]).argsort(kind="stable")[:k]].tolist()
    else:
        best = (-probabilities).argsort(kind="stable")[:k].tolist()
    return [Prediction(labels[i], i, shares[i]) for i in best]


def normalize(embedding: np.ndarray) -> np.ndarray:
    """float32 [..., width] to unit length along the last axis; a zero vector stays zero."""
    length = np.linalg.norm(embedding, axis=-1, keepdims=True)
    scaled: np.ndarray = embedding / np.maximum(length, 1e-12)
    return scaled
