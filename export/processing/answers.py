"""A graph's outputs to what a client reads."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np


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


def top_k(probabilities: np.ndarray, labels: Sequence[str], k: int) -> list[Prediction]:
    """The k most probable of float32 [classes], most probable first; equal ones in the order of the classes."""
    best: list[int] = (-probabilities).argsort(kind="stable")[:k].tolist()
    return [Prediction(labels[i], i, float(probabilities[i])) for i in best]


def normalize(embedding: np.ndarray) -> np.ndarray:
    """float32 [..., width] to unit length along the last axis; a zero vector stays zero."""
    length = np.linalg.norm(embedding, axis=-1, keepdims=True)
    scaled: np.ndarray = embedding / np.maximum(length, 1e-12)
    return scaled
