"""Sampling against transformers' own processors, OpenAI's formula, and the laws of chance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.runtime.sampling import Sampled, Sampler, Sampling, draw, sample, scaled, survivors

VOCABULARY, END = 300, 7


def sampler(sampling: Sampling, place: int = 0, prompt: list[int] | None = None) -> Sampler:
    return Sampler(sampling, place=place, prompt=prompt or [], ends=frozenset({END}))


def random_logits(seed: int, rows: int = 1, vocabulary: int = VOCABULARY, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocabulary)) * spread).astype(np.float32)


def one(found: Sampler, logits: np.ndarray) -> Sampled:
    return sample([found], logits[None].copy())[0]


def distribution(found: Sampler, logits: np.ndarray) -> np.ndarray:
    """The probabilities that the next token is drawn by, float64 [vocabulary]."""
    s, row = found.sampling, logits.copy()
    found.adjust(row)
    weights = scaled(row, s.temperature).astype(np.float64)
    kept = survivors(weights.astype(np.float32), s.top_k, s.top_p, s.min_p)
    probabilities = np.zeros(len(logits))
    places = np.arange(len(logits)) if kept is None else kept
    probabilities[places] = weights[places]
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("seed", range(40))
def test_the_distribution_is_that_of_transformers(seed: int) -> None:
    chance = np.random.default_rng(seed)
    vocabulary = int(chance.choice([17, 300, 5000]))
    logits = random_logits(seed, 1, vocabulary, float(chance.choice([0.3, 3.0, 8.0])))
    prompt = chance.integers(0, vocabulary, 12).tolist()
    wish = Sampling(
        max_tokens=9,
        temperature=float(chance.uniform(0.3, 2.0)),
        top_k=int(chance.choice([0, 1, 5, 40, 10_000])),
        top_p=float(chance.choice([1.0, 0.95, 0.5, 0.05])),
        min_p=float(chance.choice([0.0, 0.02, 0.3])),
        repetition_penalty=float(chance.choice([1.0, 1.3, 0.8])),
        logit_bias={3: 2.5, 11: -4.0} if seed % 2 else {},
        min_tokens=2 if seed % 3 else 0,
    )
    processors = LogitsProcessorList()
    if wish.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in wish.logit_bias.items()]))
    if wish.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(wish.repetition_penalty))
    if wish.min_tokens:
        processors.append(MinLengthLogitsProcessor(len(prompt) + wish.min_tokens, END))
    processors.append(TemperatureLogitsWarper(wish.temperature))
    if wish.top_k:
        processors.append(TopKLogitsWarper(wish.top_k))
    if wish.top_p < 1.0:
        processors.append(TopPLogitsWarper(wish.top_p))
    if wish.min_p:
        processors.append(MinPLogitsWarper(wish.min_p))
    expected = (
        torch.softmax(processors(torch.tensor([prompt]), torch.from_numpy(logits.copy())), -1)[0].double().numpy()
    )
    found = distribution(sampler(wish, prompt=prompt), logits[0])
    assert np.array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-9)


def test_what_was_generated_counts_for_the_repetition_penalty_too() -> None:
    logits, wish = random_logits(1)[0], Sampling(max_tokens=5, temperature=0.0, repetition_penalty=1.5)
    found, written = sampler(wish, prompt=[1, 2]), [1, 2]
    for _ in range(5):
        expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([written]), torch.from_numpy(logits[None].copy()))
        written.append(one(found, logits).token)
        assert written[-1] == int(expected.argmax())


def test_presence_and_frequency_are_taken_off_as_openai_says() -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence; the prompt does not count."""
    wish = Sampling(max_tokens=50, temperature=0.0, presence_penalty=0.7, frequency_penalty=0.4)
    logits, found = random_logits(2, 1, 8)[0], sampler(wish, prompt=[0, 1, 2, 3])
    counts = np.zeros(8)
    for _ in range(50):
        expected = logits - counts * 0.4 - (counts > 0) * 0.7
        token = one(found, logits).token
        assert expected[token] >= expected.max() - 1e-5
        counts[token] += 1
    assert (counts > 0).sum() > 1


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square against the probabilities, by the seeded numbers of one sequence."""
    logits = random_logits(3, 1, 200, 1.0)[0]
    for wish in (
        Sampling(max_tokens=1, seed=1),
        Sampling(max_tokens=1, seed=2, temperature=0.7, top_p=0.9),
        Sampling(max_tokens=1, seed=3, top_k=20),
        Sampling(max_tokens=1, seed=4, temperature=1.5, min_p=0.2),
    ):
        found = sampler(wish)
        expected, counts = distribution(found, logits), np.zeros(200)
        for _ in range(5_000):
            counts[one(found, logits).token] += 1
        drawn = expected > 0
        assert not counts[~drawn].any()
        statistic = ((counts - 5_000 * expected)[drawn] ** 2 / (5_000 * expected)[drawn]).sum()
        freedom = drawn.sum() - 1
        assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_every_uniform_number_draws_the_token_whose_share_it_falls_into() -> None:
    weights = np.array([0.0, 3.0, 0.0, 1.0, 0.0] * 100, np.float32)
    below = weights.cumsum(dtype=np.float64) / weights.sum()
    for uniform in (0.0, 0.25, 0.5, 0.123456, 0.987654, math.nextafter(1.0, 0.0)):
        token = draw(weights, None, uniform)
        assert weights[token] > 0
        assert below[token - 1] <= uniform <= below[token]
        assert draw(weights, np.arange(500), uniform) == token
        assert draw(weights[:5], None, uniform) in (1, 3)


def test_zero_temperature_takes_the_likeliest_and_of_equals_the_first() -> None:
    logits = random_logits(5, 6)
    logits[2, [40, 20, 30]] = 50.0
    greedy = [sampler(Sampling(max_tokens=1, temperature=0.0)) for _ in logits]
    found = [one.token for one in sample(greedy, logits.copy())]
    assert found == logits.argmax(axis=1).tolist()
    assert found[2] == 20
    kept = [sampler(Sampling(max_tokens=1, top_k=1)) for _ in logits]
    assert [one.token for one in sample(kept, logits.copy())] == found


def test_log_probabilities_are_the_models_own() -> None:
    logits = random_logits(6, 3)
    expected = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    wish = Sampling(
        max_tokens=1, temperature=0.3, top_p=0.5, logit_bias={9: 90.0}, repetition_penalty=2.0, alternatives=4
    )
    found = sample([sampler(wish, prompt=list(range(30))) for _ in logits], logits.copy())
    for row, chosen in zip(expected, found, strict=True):
        assert chosen.token == 9
        assert chosen.log_probability == pytest.approx(row[9], abs=1e-4)
        assert list(chosen.alternatives) == np.argsort(-row)[:4].tolist()
        assert list(chosen.alternatives.values()) == pytest.approx(np.sort(row)[::-1][:4].tolist(), abs=1e-4)


def test_what_nobody_needs_is_not_measured_and_changes_no_token() -> None:
    """Beside rows that are measured, too; several answers are compared, so theirs always are."""
    logits, seeds = random_logits(9, 9), range(9)
    wishes = [Sampling(max_tokens=1, seed=seed, top_p=0.9, alternatives=2) for seed in seeds]
    measured = sample([sampler(wish) for wish in wishes], logits.copy())
    some = [replace(wish, alternatives=None if seed % 3 else 2) for seed, wish in zip(seeds, wishes, strict=True)]
    found = sample([sampler(wish) for wish in some], logits.copy())
    for seed, one, other in zip(seeds, found, measured, strict=True):
        assert one == (Sampled(other.token) if seed % 3 else other)
    compared = sample([sampler(replace(wishes[0], alternatives=None, n=2, best_of=2))], logits[:1].copy())[0]
    assert compared.log_probability == measured[0].log_probability


def test_all_tokens_may_be_alternatives() -> None:
    logits = random_logits(6, 1, 70)
    found = one(sampler(Sampling(max_tokens=1, alternatives=100)), logits[0])
    assert list(found.alternatives) == np.argsort(-logits[0]).tolist()
    assert sum(map(math.exp, found.alternatives.values())) == pytest.approx(1.0, abs=1e-5)


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    """The sequence moves from row to row among strangers with wishes of all kinds."""
    wish = Sampling(max_tokens=30, seed=11, top_p=0.9, temperature=1.3, presence_penalty=0.5)
    steps = random_logits(7, 30, 999)
    alone, among = sampler(wish, place=1), sampler(wish, place=1)
    other = sampler(wish, place=2)
    expected = [one(alone, row).token for row in steps]
    strangers = [
        sampler(Sampling(max_tokens=99, temperature=0.0)),
        sampler(Sampling(max_tokens=99, top_k=3)),
        sampler(Sampling(max_tokens=99, logit_bias={1: 5.0}, min_p=0.1)),
        sampler(replace(wish, max_tokens=99), place=3),
    ]
    found = []
    for step, row in enumerate(steps):
        batch = strangers[: step % 5]
        batch.insert(step % (len(batch) + 1), among)
        logits = random_logits(100 + step, len(batch), 999)
        logits[batch.index(among)] = row
        found.append(sample(batch, logits)[batch.index(among)].token)
    assert found == expected
    assert [one(other, row).token for row in steps] != expected


def test_without_a_seed_every_sequence_is_another() -> None:
    flat = np.zeros(5000, np.float32)
    assert len({one(sampler(Sampling(max_tokens=1)), flat).token for _ in range(8)}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-3, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.1}, {"logit_bias": {2: -100.0}}])
def test_logits_that_are_no_numbers_do_no_harm(temperature: float, filters: dict[str, float]) -> None:
    wish = Sampling(max_tokens=1, temperature=temperature, min_tokens=1, alternatives=3, **filters)  # type: ignore[arg-type]
    logits = random_logits(8, 6, 90)
    logits[0, ::2] = np.nan
    logits[1, 5] = np.inf
    logits[2] = np.nan
    logits[3] = -np.inf
    logits[4, [1, 2]] = np.inf, -np.inf
    logits[5, 1:] = -np.inf
    with np.errstate(all="raise", under="ignore"):
        found = [chosen.token for chosen in sample([sampler(wish) for _ in logits], logits.copy())]
    assert found[0] % 2 == 1
    assert (found[1], found[4], found[5]) == (5, 1, 0)
    assert all(0 <= token < 90 and token != END for token in found)


def test_an_end_comes_after_the_least_number_of_tokens() -> None:
    logits = np.zeros(VOCABULARY, np.float32)
    logits[END] = 50.0
    found = sampler(Sampling(max_tokens=9, min_tokens=3))
    tokens = [one(found, logits).token for _ in range(4)]
    assert END not in tokens[:3]
    assert tokens[3] == END


@pytest.mark.parametrize("vocabulary", [5, 64, 130, 4000])
@pytest.mark.parametrize("levels", [2, 50, 10**6])
def test_cuts_are_those_of_a_full_sort(vocabulary: int, levels: int) -> None:
    """Of equal weights, which few levels give, those with the lowest ids are kept."""
    chance = np.random.default_rng(vocabulary * levels)
    for _ in range(20):
        weights = scaled((chance.integers(0, levels, vocabulary) / levels * 5).astype(np.float32), 1.0)
        order = np.argsort(-weights, kind="stable")
        k = int(chance.integers(1, vocabulary))
        assert survivors(weights, top_k=k).tolist() == sorted(order[:k].tolist())  # type: ignore[union-attr]
        p = float(chance.uniform(0.01, 0.999))
        below = weights[order].cumsum(dtype=np.float64)
        last = int(below.searchsorted(p * weights.sum(dtype=np.float64)))
        assert survivors(weights, top_p=p).tolist() == sorted(order[: last + 1].tolist())  # type: ignore[union-attr]


@pytest.mark.parametrize(("top_p", "count"), [(1e-300, 1), (1e-9, 1), (0.1, 7)])
def test_one_of_equally_likely_tokens_remains(top_p: float, count: int) -> None:
    kept = survivors(np.ones(64, np.float32), top_p=top_p)
    assert kept is not None
    assert kept.tolist() == list(range(count))
