"""What is made of the measurements: medians, percentiles, and the ratios that we aim at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import msgspec

from benchmarks.generation.measured import Measured, milliseconds

OURS, BARE, TRANSFORMERS = "espalier", "the bare loop", "transformers"

# By contender and streams, the rounds; all that took part in a round had the same prompts.
Rounds = Mapping[tuple[str, int], Sequence[Measured]]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One contender at one number of streams. rate: tokens a second of all streams together, the median of the rounds;
    slowest, fastest: of them. first, per_token: milliseconds, over the answers of all rounds, with the 99th percentile.
    alike: share of the answers that are to the letter those of transformers."""

    contender: str
    streams: int
    rounds: int
    rate: float
    slowest: float
    fastest: float
    first: float
    first_p99: float
    per_token: float
    per_token_p99: float
    alike: float


class Aim(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio of our float32 tokens a second to another's, the median of the rounds."""

    words: str
    streams: int
    other: str
    aim: float
    ratio: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.aim


def figures(rounds: Rounds) -> list[Figure]:
    return [
        figure(name, streams, found, rounds.get((TRANSFORMERS, streams), ()))
        for (name, streams), found in rounds.items()
    ]


def figure(name: str, streams: int, found: Sequence[Measured], reference: Sequence[Measured]) -> Figure:
    rates = [one.rate for one in found]
    first = [seconds for one in found for seconds in one.first_tokens()]
    per_token = [seconds for one in found for seconds in one.per_token()]
    same = [
        mine.text == theirs.text
        for one, other in zip(found, reference, strict=False)
        for mine, theirs in zip(one.answers, other.answers, strict=True)
    ]
    return Figure(
        contender=name,
        streams=streams,
        rounds=len(found),
        rate=median(rates),
        slowest=min(rates),
        fastest=max(rates),
        first=milliseconds(first, 50),
        first_p99=milliseconds(first, 99),
        per_token=milliseconds(per_token, 50),
        per_token_p99=milliseconds(per_token, 99),
        alike=sum(same) / len(same) if same else float("nan"),
    )


def aims(rounds: Rounds, peers: Iterable[str]) -> list[Aim]:
    """Those that can be said of what was measured."""
    wanted = [
        ("transformers, one stream", 1, [TRANSFORMERS], 3.5),
        ("the bare loop, 16 streams", 16, [BARE], 0.9),
        ("the fastest peer, 16 streams", 16, [*peers], 1.0),
        ("the fastest peer, 32 streams", 32, [*peers], 1.0),
    ]
    found = []
    for words, streams, others, aim in wanted:
        there = {name: rounds[name, streams] for name in others if (name, streams) in rounds}
        ours = rounds.get((OURS, streams))
        if not there or not ours:
            continue
        other = max(there, key=lambda name: median(one.rate for one in there[name]))
        ratio = median(mine.rate / theirs.rate for mine, theirs in zip(ours, there[other], strict=False))
        found.append(Aim(words=words, streams=streams, other=other, aim=aim, ratio=ratio))
    return found
