"""What was measured, kept as it comes so that an interrupted run goes on, and what is made of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.peers.contenders import OURS
from benchmarks.peers.models import CASES, Case
from benchmarks.peers.wrk import Measured

CEILING = "ONNX Runtime alone"


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. connections: 0 for ONNX Runtime alone, whose rate is in samples. cpu: microseconds of all the
    server's processes an answer."""

    contender: str
    case: str
    connections: int
    round: int
    measured: Measured
    cpu: float


class Kept(msgspec.Struct):
    """Of one contender, in a file. conditions: what a measurement depends on; under others it is thrown away."""

    conditions: dict[str, str]
    figures: list[Figure]


class Store:
    """The files of an unfinished run in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: dict[str, Kept] = {}

    def path(self, contender: str) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '-', contender.lower())}.json"

    def open(self, contender: str, conditions: dict[str, str]) -> None:
        try:
            found = msgspec.json.decode(self.path(contender).read_bytes(), type=Kept)
        except (OSError, msgspec.DecodeError):
            found = Kept(conditions, [])
        self.kept[contender] = found if found.conditions == conditions else Kept(conditions, [])

    def has(self, contender: str, case: str, connections: int, round_: int) -> bool:
        wanted = (case, connections, round_)
        return any((one.case, one.connections, one.round) == wanted for one in self.kept[contender].figures)

    def add(self, figure: Figure) -> None:
        self.kept[figure.contender].figures.append(figure)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(figure.contender)
        apart = path.with_suffix(".part")
        apart.write_bytes(msgspec.json.format(msgspec.json.encode(self.kept[figure.contender]), indent=1))
        os.replace(apart, path)

    def figures(self) -> list[Figure]:
        return [one for kept in self.kept.values() for one in kept.figures]

    def clear(self) -> None:
        for path in self.folder.glob("*.json"):
            path.unlink()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One contender at one case and number of connections: medians over the rounds, but all errors. ceiling: the rate
    over that of ONNX Runtime alone in the same round."""

    contender: str
    case: str
    connections: int
    rate: float
    p50: float
    p99: float
    errors: int
    cpu: float
    ceiling: float | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Our best at one case and number of connections, and the best peer's, which answers most requests a second.
    ratio: of their rates in the same rounds, the median."""

    case: str
    connections: int
    ours: Row
    peer: Row | None
    ratio: float | None


class Aim(msgspec.Struct, frozen=True, kw_only=True):
    words: str
    aim: str
    found: str
    met: bool


def rows(figures: Sequence[Figure]) -> list[Row]:
    """In the order of cases, connections, and contenders as they come."""
    ceilings = {(one.case, one.round): one.measured.rate for one in figures if one.contender == CEILING}
    found: dict[tuple[str, int, str], list[Figure]] = {}
    for one in figures:
        if one.contender != CEILING:
            found.setdefault((one.case, one.connections, one.contender), []).append(one)
    order = {case.name: place for place, case in enumerate(CASES)}
    made = []
    for (case, connections, contender), several in sorted(
        found.items(), key=lambda item: (order[item[0][0]], item[0][1])
    ):
        shares = [one.measured.rate / ceilings[case, one.round] for one in several if (case, one.round) in ceilings]
        made.append(
            Row(
                contender=contender,
                case=case,
                connections=connections,
                rate=median(one.measured.rate for one in several),
                p50=median(one.measured.p50 for one in several),
                p99=median(one.measured.p99 for one in several),
                errors=sum(one.measured.errors for one in several),
                cpu=median(one.cpu for one in several),
                ceiling=median(shares) if shares else None,
            )
        )
    return made


def ratio(figures: Sequence[Figure], ours: Row, peer: Row) -> float | None:
    """The median over the rounds that both have."""

    def rates(row: Row) -> dict[int, float]:
        place = (row.contender, row.case, row.connections)
        return {one.round: one.measured.rate for one in figures if (one.contender, one.case, one.connections) == place}

    mine, other = rates(ours), rates(peer)
    found = [mine[round_] / other[round_] for round_ in mine.keys() & other.keys() if other[round_] > 0]
    return median(found) if found else None


def comparisons(figures: Sequence[Figure]) -> list[Comparison]:
    """Where we were measured."""
    made, table = [], rows(figures)
    for case, connections in dict.fromkeys((row.case, row.connections) for row in table):
        here = [row for row in table if (row.case, row.connections) == (case, connections)]
        ours = max((row for row in here if row.contender in OURS), key=rate_of, default=None)
        peer = max((row for row in here if row.contender not in OURS), key=rate_of, default=None)
        if ours is not None:
            compared = ratio(figures, ours, peer) if peer is not None else None
            made.append(Comparison(case=case, connections=connections, ours=ours, peer=peer, ratio=compared))
    return made


def rate_of(row: Row) -> float:
    return row.rate


def aims(found: Sequence[Comparison]) -> list[Aim]:
    """Those that what was measured can tell of."""
    made = []
    compared = [one for one in found if one.ratio is not None]
    if compared:
        best = sum(one.ratio is not None and one.ratio > 1 for one in compared)
        words = "more requests a second than every peer, at every request and concurrency"
        made.append(Aim(words=words, aim="all", found=f"{best} of {len(compared)}", met=best == len(compared)))
    for case, least in (("mlp-json", 3.5), ("mlp-binary", 6.0)):
        made += at_64(found, case, "times the best peer", least, lambda one: one.ratio)
    for case in ("cnn", "text-32", "text-128"):
        made += at_64(found, case, "of ONNX Runtime alone", 0.95, lambda one: one.ours.ceiling)
    if found:
        worst = max(found, key=lambda one: one.ours.p99 / one.ours.p50)
        times = worst.ours.p99 / worst.ours.p50
        place = f"{times:.1f} ({worst.case}, {worst.connections})"
        made.append(Aim(words="p99 over the median, at worst", aim="≤ 3", found=place, met=times <= 3))
    return made


def at_64(
    found: Sequence[Comparison], case: str, words: str, least: float, figure: Callable[[Comparison], float | None]
) -> list[Aim]:
    there = next((one for one in found if (one.case, one.connections) == (case, 64)), None)
    value = figure(there) if there is not None else None
    if value is None:
        return []
    return [
        Aim(
            words=f"{words_of(case).words}, 64 connections: {words}",
            aim=f"≥ {least:g}",
            found=f"{value:.2f}",
            met=value >= least,
        )
    ]


def words_of(case: str) -> Case:
    return next(one for one in CASES if one.name == case)
