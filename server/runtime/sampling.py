"""Which token comes next in each of many sequences, every one with wishes of its own. No graph in here.

A row of logits is changed in the order of vLLM's sampler: logit bias, penalties (repetition, frequency, presence), what
the grammar and min_tokens forbid, temperature; then it is cut as transformers does, by top-k, top-p and min-p, and one
token is drawn with one random number. Nothing is sorted but the few tokens that may be drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from export.processing.inputs import BadInput
from server.runtime.grammar import Grammar

# Below every logit that is possible, above what is forbidden.
LOWEST = float(np.finfo(np.float32).min)
# Likely tokens are found among groups of this many neighbours.
GROUP = 64


@dataclass(frozen=True)
class Sampling:
    """What is asked of the answers to one prompt.

    max_tokens: after so many an answer breaks off. n: answers, the best of `best_of`. temperature: logits are divided
        by it; 0: the likeliest token is taken. top_k: the likeliest so many may be drawn; 0: all. top_p: the fewest
        that together have this probability (Holtzman et al., 2020). min_p: those with this share of the likeliest's
        probability (Nguyen et al., 2024).
    repetition_penalty: positive logits of tokens of the prompt and the answer are divided by it, negative ones
        multiplied (Keskar et al., 2019). frequency_penalty, presence_penalty: are taken off the logit of a token of
        the answer: the one as often as it occurred, the other once (OpenAI). logit_bias: is added to logits of tokens.
    seed: None: other answers every time. stop: texts that end an answer. alternatives: likeliest tokens to note at
        every step, beside the log-probability of the one that was taken; None: that is not asked for either.
        min_tokens: so many come before an end. grammar: what the answer has to be.
    """

    max_tokens: int
    n: int = 1
    best_of: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    alternatives: int | None = 0
    min_tokens: int = 0
    grammar: Grammar | None = None

    @property
    def measured(self) -> bool:
        """Whether log-probabilities are needed: asked for, or to tell the best of several answers."""
        return self.alternatives is not None or self.best_of > 1


@dataclass(frozen=True)
class Sampled:
    """The next token. log_probability: in the model's own distribution, before anything was changed; so are those of
    `alternatives`, the likeliest tokens, best first. 0 and none where nobody needs them."""

    token: int
    log_probability: float = 0.0
    alternatives: dict[int, float] = field(default_factory=dict)


class Sampler:
    """One sequence: what has occurred in it, its random numbers, and where in the grammar it is."""

    def __init__(self, sampling: Sampling, *, place: int, prompt: Sequence[int], ends: frozenset[int]) -> None:
        """place: of this sequence among those of its prompt, from 0: sequences with a seed are drawn with random
        numbers of (seed, place). ends: tokens that end a sequence."""
        self.sampling = sampling
        self.random = generator(sampling.seed, place) if sampling.temperature else None
        self.generated = 0
        self.ends = np.array(sorted(ends), np.int64)
        self.biased = np.fromiter(sampling.logit_bias, np.int64, len(sampling.logit_bias))
        self.bias = np.fromiter(sampling.logit_bias.values(), np.float32, len(sampling.logit_bias))
        self.matcher = sampling.grammar.matcher() if sampling.grammar is not None else None
        self.penalized = bool(
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty
        )
        # Tokens that occurred, each once, and how often in the answer; `places` of them in these arrays.
        first = dict.fromkeys(prompt) if sampling.repetition_penalty != 1.0 else {}
        self.places = {token: place for place, token in enumerate(first)}
        room = len(first) + sampling.max_tokens if self.penalized else 0
        self.occurred, self.counts = np.zeros(room, np.int64), np.zeros(room, np.float32)
        self.occurred[: len(first)] = list(first)

    @property
    def complete(self) -> bool:
        """Whether the grammar has come to its end: the answer is whole and nothing may follow it."""
        return self.matcher is not None and self.matcher.is_complete

    @property
    def failure(self) -> BadInput | None:
        """Why the grammar can be followed no further, if so: the answer would not fit it."""
        return self.matcher.failure if self.matcher is not None else None

    def adjusts(self, likeliest: int) -> bool:
        """Whether the next logits, of which this token is the likeliest, must be changed. That the end may not come
        yet changes nothing where another is taken anyway."""
        if self.penalized or self.matcher is not None or len(self.biased):
            return True
        early = self.generated < self.sampling.min_tokens
        return early and (self.random is not None or bool((self.ends == likeliest).any()))

    def adjust(self, logits: np.ndarray) -> None:
        """Bias, penalties and masks on float32 [vocabulary], in place. At least one token stays possible."""
        s = self.sampling
        logits[self.biased] += self.bias
        if self.penalized:
            occurred, counts = self.occurred[: len(self.places)], self.counts[: len(self.places)]
            found = logits[occurred]
            if s.repetition_penalty != 1.0:
                found = np.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
            logits[occurred] = found - s.frequency_penalty * counts - s.presence_penalty * (counts > 0)
        early = self.generated < s.min_tokens
        if early or self.matcher is not None:
            np.maximum(logits, LOWEST, out=logits)
        if self.matcher is not None:
            allowed = self.matcher.allowed(len(logits))
            logits[~allowed] = -np.inf
            early = early and bool(np.delete(allowed, self.ends).any())
        if early:
            logits[self.ends] = -np.inf

    def accept(self, token: int) -> None:
        """The sequence goes on with this token."""
        self.generated += 1
        if self.penalized:
            place = self.places.setdefault(token, len(self.places))
            self.occurred[place] = token
            self.counts[place] += 1
        if self.matcher is not None:
            self.matcher.accept(token)


def sample(samplers: Sequence[Sampler], logits: np.ndarray) -> list[Sampled]:
    """The next token of each sequence, which its sampler takes note of. logits: float32 [sequences, vocabulary], may
    be changed. NaN is the least likely of all. Of equally likely tokens the first is the likeliest."""
    likeliest_tokens, largest = peaks(logits)
    if not np.isfinite(largest).all():
        logits = np.nan_to_num(logits, nan=LOWEST)
        likeliest_tokens, largest = peaks(logits)
    measured = np.flatnonzero([sampler.sampling.measured for sampler in samplers])
    normalizers = np.zeros(len(logits), np.float32)
    if len(measured):
        some = logits if len(measured) == len(logits) else logits[measured]
        normalizers[measured] = largest[measured] + np.log(scaled(some, 1.0).sum(axis=1))
    found = []
    for i, (sampler, token) in enumerate(zip(samplers, likeliest_tokens.tolist(), strict=True)):
        s, row = sampler.sampling, logits[i]
        if sampler.adjusts(token):
            row = row.copy()
            sampler.adjust(row)
            token = int(row.argmax())
        if sampler.random is not None:
            weights = scaled(row, s.temperature)
            token = draw(weights, survivors(weights, s.top_k, s.top_p, s.min_p), sampler.random.random())
        found.append(measure(token, logits[i], normalizers[i], s.alternatives or 0) if s.measured else Sampled(token))
        sampler.accept(token)
    return found


def scores(logits: np.ndarray, tokens: np.ndarray, alternatives: int) -> list[Sampled]:
    """Tokens that are given, not drawn: int64 [places], each by its row of float32 [places, vocabulary], which may be
    changed."""
    logits = np.nan_to_num(logits, copy=False, nan=LOWEST)
    normalizers = logits.max(axis=1) + np.log(scaled(logits, 1.0).sum(axis=1))
    rows = zip(tokens.tolist(), logits, normalizers, strict=True)
    return [measure(token, row, normalizer, alternatives) for token, row, normalizer in rows]


def peaks(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest token of each row, and its logit: NaN where the row has one."""
    tokens = logits.argmax(axis=1)
    return tokens, logits[np.arange(len(logits)), tokens]


def measure(token: int, logits: np.ndarray, normalizer: np.float32, alternatives: int) -> Sampled:
    best = likeliest(logits, alternatives)
    others = dict(zip(best.tolist(), (logits[best] - normalizer).tolist(), strict=True))
    return Sampled(token, float(logits[token] - normalizer), others)


def generator(seed: int | None, place: int) -> np.random.Generator:
    """The random numbers of one sequence of a prompt: of its own, so that they do not depend on the batch."""
    return np.random.default_rng() if seed is None else np.random.default_rng((seed % 2**64, place))


def scaled(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities in shares of the likeliest's: float32 [..., vocabulary]."""
    with np.errstate(over="ignore"):  # to minus infinity, of low temperatures
        weights: np.ndarray = logits - logits.max(axis=-1, keepdims=True)
        if temperature != 1.0:
            weights /= temperature
    np.exp(weights, out=weights)
    return weights


def survivors(weights: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray | None:
    """The tokens that may be drawn, in their order; None: all. weights: of `scaled`, [vocabulary]."""
    kept = None
    if 0 < top_k < len(weights):
        kept = top(weights, top_k)
    if top_p < 1.0:
        kept = nucleus(weights, top_p) if kept is None else kept[nucleus(weights[kept], top_p)]
    if min_p > 0.0:
        kept = np.flatnonzero(weights >= min_p) if kept is None else kept[weights[kept] >= min_p]
    return kept


def top(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest of float32 [values], in their order; of equal ones the first.

    The largest of each group of values are `count` values or more that are not below the least of the `count` largest
    groups: only what reaches that is looked at.
    """
    if count <= (groups := len(values) // GROUP):
        peaks = values[: groups * GROUP].reshape(GROUP, groups).max(axis=0)
        places = np.flatnonzero(values >= np.partition(peaks, groups - count)[groups - count])
    else:
        places = np.arange(len(values))
    found = values[places]
    least = np.partition(found, len(found) - count)[len(found) - count]
    kept: np.ndarray = places[first_of(found, least, count)]
    return kept


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The places of the fewest of float32 [weights] that together have a share `top_p` of their sum, in their order.

    Those below an equal share of what may be left out cannot be among them: all together are too few. The others are
    counted by the leading bits of their weights, which order positive floats, and only those of the bits at which the
    share is reached are sorted.
    """
    target = float(weights.sum(dtype=np.float64))
    places = np.flatnonzero(weights >= min((1.0 - top_p) * target / len(weights), float(weights.max())))
    target *= top_p
    found = weights[places]
    bits = found.view(np.int32) >> 16
    bits -= bits.min()
    reached = np.bincount(bits, weights=found)[::-1].cumsum()
    steps = min(int(reached.searchsorted(target)), len(reached) - 1)
    edge = len(reached) - 1 - steps
    before = float(reached[steps - 1]) if steps else 0.0
    ordered = np.sort(found[bits == edge])[::-1]
    count = min(int(ordered.cumsum(dtype=np.float64).searchsorted(target - before)) + 1, len(ordered))
    kept: np.ndarray = places[first_of(found, ordered[count - 1], int(np.count_nonzero(bits > edge)) + count)]
    return kept


def first_of(values: np.ndarray, least: float, count: int) -> np.ndarray:
    """Which of the values are the `count` largest, the smallest of which is `least`: bool [values]. Of those that
    equal it, the first."""
    kept: np.ndarray = values >= least
    if excess := int(np.count_nonzero(kept)) - count:
        kept[np.flatnonzero(values == least)[-excess:]] = False
    return kept


def draw(weights: np.ndarray, tokens: np.ndarray | None, uniform: float) -> int:
    """One of the tokens, or of all, by their weights; uniform: a random number from 0 to 1, without 1."""
    if tokens is not None:
        return int(tokens[place_of(weights[tokens], uniform)])
    if len(weights) < GROUP:
        return place_of(weights, uniform)
    groups = len(weights) // GROUP
    # The group first, then one of it: the sum of all is not needed token by token.
    sums = weights[: groups * GROUP].reshape(groups, GROUP).sum(axis=1)
    sums = np.append(sums, weights[groups * GROUP :].sum()).cumsum(dtype=np.float64)
    target = uniform * sums[-1]
    group = place_in(sums, target)
    chosen = weights[group * GROUP : (group + 1) * GROUP].cumsum(dtype=np.float64)
    return group * GROUP + place_in(chosen, target - (sums[group - 1] if group else 0.0))


def place_of(weights: np.ndarray, uniform: float) -> int:
    below = weights.cumsum(dtype=np.float64)
    return place_in(below, uniform * below[-1])


def place_in(below: np.ndarray, target: float) -> int:
    """The first of cumulated weights that is above the target; never one that weighs nothing."""
    return min(int(below.searchsorted(target, side="right")), int(below.searchsorted(below[-1])))


def likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """The `count` likeliest tokens of float32 [vocabulary], best first."""
    if not count:
        return np.zeros(0, np.int64)
    tokens = top(logits, min(count, len(logits)))
    best: np.ndarray = tokens[np.argsort(-logits[tokens], kind="stable")]
    return best
