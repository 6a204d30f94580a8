"""Which token comes next: greedy, sampled or by beam search, for all the rows of a batch at once. No graph in here.

A hypothesis is a sequence that may become an answer. A row begins with one and may have several later: its beams, or
sequences drawn side by side. Hypotheses that are finished leave the batch at once and cost nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from server.runtime.sampling import draw, generator, scaled, survivors

# A character is at most this many tokens: the bytes of its UTF-8.
TOKENS_A_CHARACTER = 4


@dataclass(frozen=True)
class Options:
    """What one row asks for; rows with different options may share a batch.

    max_tokens: after so many, without the end of the sequence, an answer breaks off. n: answers, at most `best_of`,
        or `beams` where they are more than 1. temperature: logits are divided by it before one is drawn; 0: the
        likeliest is taken. top_p: drawn from the fewest tokens that together have this probability (Holtzman et al.,
        2020). beams: above 1, beam search, without drawing. length_penalty: α of Wu et al., 2016: beams are compared
        by log P · 6^α / (5 + tokens)^α. seed: None: another one every time. stop: texts that end an answer.
        alternatives: likeliest tokens to note at every step, beside the one that was taken.
    """

    max_tokens: int
    n: int = 1
    best_of: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 0.6
    seed: int | None = None
    stop: tuple[str, ...] = ()
    alternatives: int = 0
    attention: bool = False

    @property
    def sequences(self) -> int:
        """How many hypotheses a row has at most."""
        return max(self.beams, self.best_of)


@dataclass(frozen=True)
class Candidate:
    """An answer. tokens: without that of the end. log_probabilities: of these tokens, in the model's own distribution
    (temperature 1). log_probability: of the whole sequence, with its end where it has one. score: what candidates of
    a row are compared by: log_probability a token, or for beams with the length penalty. alternatives: at each
    token, those that were likeliest, with their log-probabilities. attention: float32 [tokens, source]. The last two
    only where they were asked for."""

    tokens: list[int]
    log_probabilities: list[float]
    log_probability: float
    score: float
    finish_reason: Literal["stop", "length"]
    alternatives: list[dict[int, float]]
    attention: np.ndarray | None


@dataclass(frozen=True)
class _Step:
    """What was appended in one step, [entries] each. parents: entries of the step before that were continued.
    alternatives: tokens and log-probabilities, [entries, most]."""

    parents: np.ndarray
    tokens: np.ndarray
    gains: np.ndarray
    alternatives: tuple[np.ndarray, np.ndarray] | None
    attention: np.ndarray | None


# Told every token of a row as it comes; False: nobody waits for more.
Listener = Callable[[int], bool]


class Search:
    """The hypotheses of a batch. `owner` [hypotheses]: the row of each; `tokens`: the last token of each."""

    def __init__(
        self,
        options: Sequence[Options],
        end: int,
        text: Callable[[list[int]], str],
        listeners: Sequence[Listener | None] | None = None,
    ) -> None:
        """end: the token that ends a sequence. text: of tokens, for stop texts. listeners: of rows with one
        hypothesis."""
        rows = len(options)
        self.options, self.end, self.text = options, end, text
        self.listeners = listeners or [None] * rows
        self.owner = np.arange(rows)
        self.tokens = np.zeros(0, np.int64)
        self.scores = np.zeros(rows)
        self.finished: list[list[Candidate]] = [[] for _ in options]
        self.history: list[_Step] = []
        self.entries = np.zeros(rows, np.int64)  # where each hypothesis is in the last step
        self.beamed = np.array([o.beams > 1 for o in options])
        self.limits = np.array([o.max_tokens for o in options])
        self.watched = np.array([bool(o.stop or listener) for o, listener in zip(options, self.listeners, strict=True)])
        self.attending = any(o.attention for o in options)
        self.most_alternatives = max(o.alternatives for o in options)
        # Of the hypotheses without beams, which always stand before those with them.
        self.generators: list[np.random.Generator | None] = []

    def advance(self, logits: np.ndarray, attention: np.ndarray | None = None) -> np.ndarray:
        """Continue every hypothesis by a token. logits: float32 [hypotheses, vocabulary]; attention: float32
        [hypotheses, source].

        Returns parents, int64 [hypotheses that go on]: which of the former ones each continues. Empty: all is done.
        """
        normalizer = log_sum_exp(logits)
        beamed = self.beamed[self.owner]
        lanes = np.flatnonzero(~beamed)
        if not self.history:
            lanes = self._spread(lanes)
        continued = [(lanes, self._draw(lanes, logits))]
        rows_of_beams = np.unique(self.owner[beamed]).tolist()
        if rows_of_beams:
            continued += self._extend(rows_of_beams, np.flatnonzero(beamed), logits, normalizer)
        parents, tokens = (np.concatenate(part) for part in zip(*continued, strict=True))
        gains = logits[parents, tokens].astype(np.float64) - normalizer[parents]
        owner, scores = self.owner[parents], self.scores[parents] + gains
        seen = attention[parents] if attention is not None and self.attending else None
        others = None
        if self.most_alternatives:
            others = best_of_each(logits[parents], normalizer[parents], self.most_alternatives)
        self.history.append(_Step(self.entries[parents], tokens, gains, others, seen))
        ended = tokens == self.end
        over = ended | (len(self.history) >= self.limits[owner])
        for i in np.flatnonzero(self.watched[owner] & ~ended).tolist():
            if self._is_stopped(i, int(owner[i])):
                ended[i] = over[i] = True
        for i in np.flatnonzero(over).tolist():
            self._finish(i, int(owner[i]), float(scores[i]), "stop" if ended[i] else "length")
        for row in rows_of_beams:
            mine = owner == row
            if self._is_decided(row, scores[mine & ~over]):
                over |= mine
        kept = np.flatnonzero(~over)
        self.generators = [self.generators[i] for i in kept.tolist() if i < len(self.generators)]
        self.owner, self.tokens, self.scores, self.entries = owner[kept], tokens[kept], scores[kept], kept
        return parents[kept]

    def answers(self, row: int) -> list[Candidate]:
        """The `n` best candidates of a row, best first."""
        return sorted(self.finished[row], key=lambda candidate: -candidate.score)[: self.options[row].n]

    def _spread(self, lanes: np.ndarray) -> np.ndarray:
        """In the first step: every row without beams as often as it has sequences to draw, each with its generator."""
        rows = lanes.tolist()
        self.generators = [
            None if o.temperature == 0.0 else generator(o.seed, place)
            for o in (self.options[row] for row in rows)
            for place in range(o.best_of)
        ]
        return np.repeat(lanes, [self.options[row].best_of for row in rows])

    def _draw(self, lanes: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """The next token of each hypothesis without beams: the likeliest, or one that its generator draws."""
        tokens: np.ndarray = logits.argmax(axis=1)[lanes]
        for place, source in enumerate(self.generators):
            if source is not None:
                o = self.options[self.owner[lanes[place]]]
                weights = scaled(logits[lanes[place]], o.temperature)
                tokens[place] = draw(weights, survivors(weights, top_p=o.top_p), source.random())
        return tokens

    def _extend(
        self, rows: list[int], lanes: np.ndarray, logits: np.ndarray, normalizer: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Parents and tokens of the best continuations of the beams of each row, `lanes` in all: as many that go on as
        the row has beams, and the ends that are among the best so many."""
        most = 2 * max(self.options[row].beams for row in rows)
        likeliest, gains = best_of_each(logits[lanes], normalizer[lanes], most)
        scores = self.scores[lanes, None] + gains
        for row in rows:
            mine, width = np.flatnonzero(self.owner[lanes] == row), self.options[row].beams
            best = np.argsort(-scores[mine].ravel(), kind="stable")[: 2 * width]
            parents, tokens = lanes[mine[best // scores.shape[1]]], likeliest[mine].ravel()[best]
            ends = tokens == self.end
            taken = np.where(ends, np.arange(len(best)) < width, np.cumsum(~ends) <= width)
            yield parents[taken], tokens[taken]

    def _is_stopped(self, entry: int, row: int) -> bool:
        """Whether a hypothesis, with the token just appended, has a stop text in it, or nobody listens any more."""
        o, listener = self.options[row], self.listeners[row]
        step = self.history[-1]
        if listener is not None and not listener(int(step.tokens[entry])):
            return True
        if not o.stop:
            return False
        path = self._path(entry, TOKENS_A_CHARACTER * max(map(len, o.stop)) + 1)
        tail = self.text([int(step.tokens[i]) for step, i in path])
        return any(stop in tail for stop in o.stop)

    def _is_decided(self, row: int, scores: np.ndarray) -> bool:
        """Whether a row's beams that go on, of these log-probabilities, are given up. They can only lose probability,
        so none that would not be an answer if it ended now can become one; but for the length penalty, for whose sake
        as many sequences are waited for as there are beams."""
        o, found = self.options[row], self.finished[row]
        if not len(scores):
            return True
        if len(found) < (o.beams if o.length_penalty else o.n):
            return False
        worst = sorted(candidate.score for candidate in found)[-o.n]
        return normalized(float(scores.max()), len(self.history), o.length_penalty) <= worst

    def _finish(self, entry: int, row: int, score: float, reason: Literal["stop", "length"]) -> None:
        o, length = self.options[row], len(self.history)
        path = self._path(entry, length)
        if int(path[-1][0].tokens[path[-1][1]]) == self.end:
            path.pop()
        others: list[dict[int, float]] = []
        for step, i in path if o.alternatives else []:
            assert step.alternatives is not None, "noted for the whole batch"
            best = sorted(
                zip(*(part[i].tolist() for part in step.alternatives), strict=True), key=lambda pair: -pair[1]
            )
            others.append(dict(best[: o.alternatives]))
        attention = None
        if o.attention and self.history[0].attention is not None:
            rows = [step.attention[i] for step, i in path if step.attention is not None]
            attention = np.stack(rows) if rows else self.history[0].attention[:0]
        self.finished[row].append(
            Candidate(
                tokens=[int(step.tokens[i]) for step, i in path],
                log_probabilities=[float(step.gains[i]) for step, i in path],
                log_probability=score,
                score=normalized(score, length, o.length_penalty) if o.beams > 1 else score / length,
                finish_reason=reason,
                alternatives=others,
                attention=attention,
            )
        )

    def _path(self, entry: int, most: int) -> list[tuple[_Step, int]]:
        """The last steps, at most `most`, that lead to an entry of the last one, oldest first."""
        path = []
        for step in self.history[: -most - 1 : -1]:
            path.append((step, entry))
            entry = int(step.parents[entry])
        return path[::-1]


def best_of_each(logits: np.ndarray, normalizer: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The `most` likeliest tokens of float32 [rows, vocabulary] in no order, int64 [rows, most], and their
    log-probabilities, float64."""
    most = min(most, logits.shape[1])
    tokens = np.argpartition(logits, -most, axis=1)[:, -most:]
    return tokens, np.take_along_axis(logits, tokens, axis=1).astype(np.float64) - normalizer[:, None]


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """float32 [rows, vocabulary] to float64 [rows]: what is taken off logits to make them log-probabilities."""
    largest = logits.max(axis=1)
    total = np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)
    normalizers: np.ndarray = largest + np.log(total)
    return normalizers


def normalized(log_probability: float, length: int, penalty: float) -> float:
    """log P divided by ((5 + length) / 6)^penalty: equation 14 of Wu et al., 2016, without its coverage."""
    return log_probability / float(((5 + length) / 6) ** penalty)
