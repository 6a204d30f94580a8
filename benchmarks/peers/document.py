"""docs/peers.md, written from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from benchmarks.architectures.pictures import Picture, panels, png, table
from benchmarks.peers.contenders import OURS
from benchmarks.peers.models import CASES
from benchmarks.peers.results import CEILING, Figure, Row, aims, comparisons, rows, words_of
from benchmarks.peers.tried import TRIED

# Of the picture, beside the document.
FOLDER = "peers"


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Of the run. generator: what made the load. settings: of each contender, in words. missing: why a contender was
    not measured, by its name; ceilings: of ONNX Runtime alone, in words, by case."""

    cores: int
    memory_gib: float
    processor: str
    minutes: float
    rounds: int
    generator: str
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    missing: Mapping[str, str]
    ceilings: Mapping[str, str]


def write(figures: Sequence[Figure], run: Conditions) -> str:
    """Markdown."""
    compared, all_rows = comparisons(figures), rows(figures)
    parts = [
        f"""# Espalier beside other model servers

Written by `python -m benchmarks.peers`: the same ONNX graphs, on the same {run.cores} CPU cores ({run.processor}, \
{run.memory_gib:.0f} GiB of memory), which
server and load share, without a GPU, in {run.minutes:.0f} minutes. Each server is alone while it is measured, in an \
environment of its own, at the best of the
settings that were tried (below), and every answer is compared with ONNX Runtime's before its speed is measured.""",
        "## What we aim at\n\n"
        + table(
            ("", "aim", "measured", ""),
            [(one.words, one.aim, f"**{one.found}**", "yes" if one.met else "**no**") for one in aims(compared)],
        ),
        "## Requests a second, beside the best peer\n\n"
        + table(
            ("request", "connections", "Espalier", "best peer", "", "ratio", "of ONNX Runtime alone", "p99 / p50"),
            [
                (
                    words_of(one.case).words,
                    str(one.connections),
                    f"**{number(one.ours.rate)}**{one.ours.contender.removeprefix(OURS[0]).replace(' v2', ' (v2)')}",
                    number(one.peer.rate) if one.peer else "–",
                    one.peer.contender if one.peer else "–",
                    f"**{one.ratio:.2f}**" if one.ratio is not None else "–",
                    f"{one.ours.ceiling:.2f}" if one.ours.ceiling is not None else "–",
                    f"{one.ours.p99 / one.ours.p50:.1f}",
                )
                for one in compared
            ],
        ),
        f"![Requests a second by connections]({FOLDER}/rates.png)",
        "## All figures",
    ]
    for case in CASES:
        here = [row for row in all_rows if row.case == case.name]
        if here:
            alone = f"\n\n{CEILING}: {run.ceilings[case.name]}." if case.name in run.ceilings else ""
            parts.append(f"### {case.words}{alone}\n\n{case_table(here)}")
    notes = [
        "Cells: requests a second, and in brackets the median and the 99th percentile of their latency in ms; all "
        f"three are medians of the rounds ({run.rounds}; 256 connections of slow networks: one), in which they take "
        "turns in another order each. CPU: microseconds of all the server's processes an answer, at 64 connections. "
        "Ratios: medians of those in each round.",
        f"Load: {run.generator}, one request at a time on each connection, from a process of its own on the same "
        "cores. wrk weighs an answer that was late by what a steady client would have sent meanwhile, for all alike.",
        "ONNX Runtime alone: samples a second in a process of its own without HTTP, at the best of several batch sizes "
        "and threads, measured in each round.",
        "JSON: 784 numbers of four digits (6 kB). Binary: 3 kB of float32, or 150 kB of uint8 pixels, as each server "
        "takes them with least work: raw, or as a binary tensor of the Open Inference Protocol. Texts: token ids, as "
        "JSON or as a binary tensor, whichever the server answers sooner. Answers: the MLP's 10 logits, the CNN's most "
        "likely label with its probability (Espalier's v2: all 1,000 logits), MiniLM's 384 numbers. Espalier's own "
        "routes answer an MLP with the names and probabilities of the 5 most likely labels, or of one for bytes.",
    ]
    parts.append("\n".join(f"- {note}" for note in notes))
    parts.append(
        "## Settings\n\n"
        + table(
            ("server", "version", "settings"),
            [(name, run.versions.get(name, ""), words) for name, words in run.settings.items()],
            3,
        )
    )
    parts.append(TRIED)
    if run.missing:
        parts.append("Not measured:\n\n" + "\n".join(f"- {name}: {words}" for name, words in run.missing.items()))
    return "\n\n".join(parts) + "\n"


def case_table(here: Sequence[Row]) -> str:
    connections = sorted({row.connections for row in here})
    lines = []
    names = dict.fromkeys(row.contender for row in here)
    best_at = {count: max(row.rate for row in here if row.connections == count) for count in connections}
    top = max(connections, key=lambda count: (count == 64, count))
    by_place = {(row.contender, row.connections): row for row in here}
    ranked = sorted(names, key=lambda name: -by_place[name, top].rate if (name, top) in by_place else 0.0)
    for name in ranked:
        cells = [cell(by_place.get((name, count)), best_at[count]) for count in connections]
        one = by_place.get((name, top))
        shown = f"**{name}**" if name in OURS else name
        share = f"{one.ceiling:.2f}" if one and one.ceiling is not None else "–"
        lines.append((shown, *cells, share, f"{one.cpu:,.0f}" if one else "–"))
    return table(("server", *map(str, connections), f"of ONNX Runtime, {top}", "CPU, µs"), lines)


def cell(row: Row | None, best: float) -> str:
    if row is None:
        return "–"
    rate = f"**{number(row.rate)}**" if row.rate == best else number(row.rate)
    broken = f", {row.errors} failed" if row.errors else ""
    return f"{rate} ({milliseconds(row.p50)} / {milliseconds(row.p99)}{broken})"


def number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2g}"


def picture(figures: Sequence[Figure]) -> Picture:
    all_rows = rows(figures)
    cases = [case for case in CASES if any(row.case == case.name for row in all_rows)]
    drawn, axes = panels(len(cases), 3.2 * len(cases), 3.6)
    names = list(dict.fromkeys(row.contender for row in all_rows))
    for axis, case in zip(axes, cases, strict=True):
        for place, name in enumerate(names):
            mine = [row for row in all_rows if (row.case, row.contender) == (case.name, name)]
            width = 2.5 if name in OURS else 1.2
            axis.plot(
                [row.connections for row in mine], [row.rate for row in mine],
                marker="o", markersize=3, label=name, linewidth=width, color=f"C{place}",
            )  # fmt: skip
        alone = [one.measured.rate for one in figures if (one.contender, one.case) == (CEILING, case.name)]
        if alone and case.model != "mlp":
            axis.axhline(sorted(alone)[len(alone) // 2], color="black", linewidth=0.8, linestyle="--", label=CEILING)
        axis.set_title(case.words, fontsize=9)
        axis.set_xscale("log", base=2)
        ticks = sorted({row.connections for row in all_rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("connections", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("requests a second", fontsize=8)
    axes[-1].legend(fontsize=6)
    return Picture("rates.png", "Requests a second by connections", png(drawn))
