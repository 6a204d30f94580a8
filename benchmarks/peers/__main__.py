"""Espalier beside other model servers, all in one run: python -m benchmarks.peers [--quick] [--output FILE]

An MLP (as JSON and as bytes), EfficientNet-Lite0 and MiniLM (32 and 128 tokens), served by Espalier, LitServe, BentoML,
Ray Serve, MLServer, nvidia-pytriton and a hand-written FastAPI application; requests a second, p50, p99 and errors at
1, 16, 64 and 256 connections, beside ONNX Runtime alone. Writes docs/peers.md. What has to be installed, exported and
kept of an interrupted run is in ~/.cache/espalier-peers; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress

from benchmarks.environments import NotInstalled, environment
from benchmarks.peers import document
from benchmarks.peers.ceiling import Ceiling, isolated
from benchmarks.peers.contenders import OURS, Contender, contenders, in_words
from benchmarks.peers.folder import KEPT
from benchmarks.peers.models import CASES, MODELS, Case, graph, publish
from benchmarks.peers.results import CEILING, Figure, Store, aims, comparisons, rows
from benchmarks.peers.running import Unfit, check, expected, running
from benchmarks.peers.wrk import Measured, Wrk, fetched, load
from server.process import cores, memory_bytes

ROOT = Path(__file__).parents[2]
CONNECTIONS = (1, 16, 64, 256)
ROUNDS = 2
CEILING_SECONDS = 3.0
# What takes longer is measured in the first round only.
LONG_SECONDS = 4
MOST_SECONDS = 8


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    cases: Sequence[Case]
    connections: Sequence[int]
    rounds: int

    def seconds(self, connections: int, alone: float) -> int:
        """Of a measurement: half as long again as the slowest answer would take at ONNX Runtime's own rate."""
        return min(max(math.ceil(1.5 * connections / alone), 1), MOST_SECONDS)

    def wanted(self, case: Case, alone: float, round_: int) -> list[int]:
        """Connections to measure in a round."""
        return [count for count in self.connections if round_ == 0 or self.seconds(count, alone) <= LONG_SECONDS]


class Bench:
    """What every measurement needs."""

    def __init__(self, folder: Path, wrk: Wrk | None, plan: Plan, store: Store, console: Console) -> None:
        self.folder, self.wrk, self.plan, self.store, self.console = folder, wrk, plan, store, console
        self.repository = folder / "models"
        self.pythons: dict[str, Path] = {}
        self.missing: dict[str, str] = {}
        self.ceilings: dict[str, Ceiling] = {}
        self.right = {case.name: expected(self.repository, case) for case in plan.cases}

    def alone(self, case: Case, round_: int) -> None:
        if self.store.has(CEILING, case.name, 0, round_):
            return
        seconds = CEILING_SECONDS if self.plan.rounds > 1 else 1.0
        found = isolated(graph(self.repository, case.model), case, seconds)
        self.ceilings[case.name] = found
        measured = Measured(rate=found.samples, p50=0.0, p99=0.0, errors=0)
        self.store.add(
            Figure(contender=CEILING, case=case.name, connections=0, round=round_, measured=measured, cpu=0.0)
        )

    def rate_alone(self, case: Case) -> float:
        figures = self.store.kept[CEILING].figures
        return next(one.measured.rate for one in figures if one.case == case.name)

    def measure(self, contender: Contender, model: str, round_: int) -> None:
        """One server with one model, whatever of it is not measured yet. Raises Unfit."""
        wanted = [
            (case, count)
            for case in self.plan.cases
            if case.model == model and model in contender.settings
            for count in self.plan.wanted(case, self.rate_alone(case), round_)
            if not self.store.has(contender.name, case.name, count, round_)
        ]
        if not wanted:
            return
        settings = contender.settings[model]
        python = self.pythons.get(contender.name, Path())
        with (
            running(contender, python, self.repository, model, settings) as server,
            tempfile.TemporaryDirectory() as files,
        ):
            for case in dict.fromkeys(case for case, _ in wanted):
                check(contender, server, case, settings, self.right[case.name])
                request = contender.request(case, settings)
                load(self.wrk, server.port, request, 16, 1, Path(files))
                for count in [count for one, count in wanted if one == case]:
                    server.settle()
                    seconds = self.plan.seconds(count, self.rate_alone(case))
                    before = server.cpu_seconds()
                    measured = load(self.wrk, server.port, request, count, seconds, Path(files))
                    used = server.cpu_seconds() - before
                    figure = Figure(
                        contender=contender.name,
                        case=case.name,
                        connections=count,
                        round=round_,
                        measured=measured,
                        cpu=1e6 * used / max(measured.rate * seconds, 1.0),
                    )
                    self.store.add(figure)


def sources() -> str:
    """Of Espalier's server: when they change, what was measured of it no longer counts."""
    found = hashlib.sha256()
    for package in ("server", "export"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def go(bench: Bench, chosen: Sequence[Contender]) -> None:
    plan = bench.plan
    with Progress(console=bench.console) as progress:
        models = [model for model in MODELS if any(case.model == model for case in plan.cases)]
        task = progress.add_task("rounds", total=plan.rounds * len(models) * len(chosen))
        for round_ in range(plan.rounds):
            for case in plan.cases:
                progress.update(task, description=f"round {round_ + 1}: {CEILING}, {case.words}")
                bench.alone(case, round_)
            for place, model in enumerate(models):
                turn = (round_ * 3 + place) % len(chosen)
                for contender in [*chosen[turn:], *chosen[:turn]]:
                    progress.update(task, description=f"round {round_ + 1}: {contender.name}, {model}")
                    if contender.name not in bench.missing:
                        tried(bench, contender, model, round_, progress.console)
                    progress.advance(task)


def tried(bench: Bench, contender: Contender, model: str, round_: int, console: Console) -> None:
    """Some servers do not always start: what is left of the measurements is tried twice."""
    for again in (True, False):
        try:
            bench.measure(contender, model, round_)
        except (Unfit, ValueError) as error:
            console.print(f"{error}; {'once more' if again else f'{contender.name} is left out'}", markup=False)
            bench.missing[contender.name] = f"{model}: {error}"
        else:
            bench.missing.pop(contender.name, None)
            return


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 1 and 64 connections; writes no document")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"in which servers take turns ({ROUNDS})")
    parser.add_argument("--only", help="contenders, by name, comma between; writes no document")
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}, comma between; writes no document")
    parser.add_argument("--envs", type=Path, default=KEPT, help="where environments, models and results are kept")
    parser.add_argument("--fresh", action="store_true", help="throw away what an interrupted run has measured")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    options = parser.parse_args(arguments)
    console = Console()
    start = time.monotonic()
    repository = options.envs / "models"
    names = options.only.split(",") if options.only else None
    chosen = [one for one in contenders(repository) if names is None or one.name in names]
    models = options.models.split(",") if options.models else MODELS
    unknown = {*(names or ())} - {one.name for one in chosen} | {*models} - {*MODELS}
    if unknown or not chosen:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in contenders(repository))}"
        )
    publish(repository, models, console.print)
    plan = Plan(
        cases=[case for case in CASES if case.model in models],
        connections=(1, 64) if options.quick else CONNECTIONS,
        rounds=1 if options.quick else options.rounds,
    )
    store = Store(options.envs / ("quick" if options.quick else "unfinished"))
    if options.fresh or options.quick:
        store.clear()
    wrk = fetched(options.envs / "wrk")
    generator = "wrk" if wrk else "our own generator (wrk cannot be had here), which costs more than wrk"
    bench = Bench(options.envs, wrk, plan, store, console)
    for contender in chosen:
        try:
            if contender.packages:
                with console.status(f"{contender.name}: {' '.join(contender.packages)}"):
                    home = options.envs / contender.name.lower().replace(" ", "-")
                    bench.pythons[contender.name] = environment(home, contender.packages)
        except NotInstalled as error:
            bench.missing[contender.name] = str(error)
            console.print(f"{contender.name} is left out: {error}", markup=False)
    common = {"rounds": str(plan.rounds), "generator": generator, "cores": str(cores())}
    store.open(CEILING, common)
    for contender in chosen:
        settings = str(contender.settings) + " ".join(contender.packages)
        store.open(
            contender.name, {**common, "settings": settings, **({} if contender.packages else {"code": sources()})}
        )
    console.print(f"load: {generator}; kept in {options.envs}")
    go(bench, chosen)
    figures = store.figures()
    minutes = (time.monotonic() - start) / 60
    report(console, figures)
    console.print(f"{minutes:.1f} minutes")
    if options.output is not None:
        whole = {"figures": figures, "rows": rows(figures), "aims": aims(comparisons(figures))}
        options.output.write_bytes(msgspec.json.format(msgspec.json.encode(whole)))
    if not (options.quick or options.only or options.models):
        run = document.Conditions(
            cores=cores(),
            memory_gib=memory_bytes() / 2**30,
            processor=processor(),
            minutes=minutes,
            rounds=plan.rounds,
            generator=generator,
            settings={one.name: in_words(one) for one in chosen},
            versions={one.name: one.packages[0].partition("==")[2] for one in chosen if one.packages},
            missing=bench.missing,
            ceilings={name: ceiling_words(found, figures, name) for name, found in bench.ceilings.items()},
        )
        drawn = document.picture(figures)
        folder = ROOT / "docs" / document.FOLDER
        folder.mkdir(exist_ok=True)
        (folder / drawn.file).write_bytes(drawn.content)
        (ROOT / "docs" / "peers.md").write_text(document.write(figures, run))
        store.clear()
    return int(OURS[0] in bench.missing)


def ceiling_words(found: Ceiling, figures: Sequence[Figure], case: str) -> str:
    rates = sorted(one.measured.rate for one in figures if (one.contender, one.case) == (CEILING, case))
    how = (
        f"batches of {found.rows}, {found.runs} side by side of {found.threads} thread{'s' * (found.threads > 1)} each"
    )
    return f"{document.number(rates[len(rates) // 2])} samples/s ({how})"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or os.uname().machine


def report(console: Console, figures: Sequence[Figure]) -> None:
    for row in rows(figures):
        share = f"{row.ceiling:5.2f} of ONNX Runtime" if row.ceiling is not None else ""
        console.print(
            f"{row.case:11} {row.connections:4}  {row.contender:13} {row.rate:9,.1f}/s  p50 {row.p50:8.2f}  "
            f"p99 {row.p99:8.2f} ms  {row.errors} errors  {row.cpu:8,.0f} µs CPU  {share}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    for one in aims(comparisons(figures)):
        console.print(f"{one.words}: {one.found}, aim {one.aim}: {'met' if one.met else 'NOT met'}", markup=False)


if __name__ == "__main__":
    raise SystemExit(main())
