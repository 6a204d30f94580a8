"""How well and how fast the graph of a language model predicts, measured through ONNX Runtime as it is served."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.slot_parity import Slots

# Tokens that are read at once; their logits are in memory together.
PIECE = 128
# Steps that are timed, after a few that are not; the place of the token that they read, where a text is so long.
STEPS, WARM_STEPS, TIMED_PLACE = 24, 4, 64


@dataclass(frozen=True)
class Judged:
    """perplexity: exp of the mean -log probability (natural) of `tokens` tokens, each from those before it in its text.
    tokens_per_second: that one sequence alone is written at, at best."""

    perplexity: float
    tokens: int
    tokens_per_second: float
    bytes: int


def judge(path: Path, texts: Sequence[NDArray[np.int64]], progress: Callable[[int, int], None]) -> Judged:
    """Of the graph at `path` on texts of at least two tokens, one of them at least. progress: tokens read, and all."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    longest = max(len(text) for text in texts)
    slots = Slots(session, 1, longest)
    total, count, of = 0.0, 0, sum(len(text) for text in texts)
    read = 0
    for text in texts:
        for start in range(0, len(text) - 1, PIECE):
            progress(read, of)
            token = text[start : start + PIECE][: len(text) - 1 - start]
            logits = slots.run(0, token[None], np.array([start + len(token)]), np.arange(len(token)))
            total -= float(_log_probabilities(logits, text[start + 1 : start + 1 + len(token)]).sum())
            count += len(token)
            read += len(token)
    progress(of, of)
    size = sum(one.stat().st_size for one in path.parent.glob(f"{path.name}*"))
    return Judged(float(np.exp(total / count)), count, _tokens_per_second(slots, min(TIMED_PLACE, longest)), size)


def texts_of(batches: Iterable[Mapping[str, NDArray[np.int64]]], most: int) -> Iterator[NDArray[np.int64]]:
    """The texts of batches of `input_ids` and `attention_mask`, those that have a second token; `most` tokens in all,
    the last one cut."""
    rows = (zip(batch["input_ids"], batch["attention_mask"], strict=True) for batch in batches)
    return some((ids[mask > 0] for ids, mask in chain.from_iterable(rows)), most)


def some(texts: Iterable[NDArray[np.int64]], most: int) -> Iterator[NDArray[np.int64]]:
    """Texts that have a second token; `most` tokens in all, the last one cut."""
    for whole in texts:
        text = whole[:most]
        most -= len(text)
        if len(text) > 1:
            yield text
        if most <= 0:
            return


def _log_probabilities(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of one token each: logits [places, vocabulary], tokens [places]."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = exact[np.arange(len(tokens)), tokens] - np.log(np.exp(exact).sum(axis=1))
    return found


def _tokens_per_second(slots: Slots, length: int) -> float:
    """The fastest step's, which other work on the machine disturbs least, of one sequence that is then `length` tokens
    long."""
    seconds = []
    for _ in range(WARM_STEPS + STEPS):
        begin = time.perf_counter()
        slots.run(0, np.zeros((1, 1), np.int64), np.array([length]), np.zeros(1, np.int64))
        seconds.append(time.perf_counter() - begin)
    return 1.0 / min(seconds[WARM_STEPS:])
