"""Every architecture trained, published, served and compared: python -m benchmarks.architectures

Writes docs/architectures.md and its pictures. What is done is kept in build/architectures: an interrupted run goes on
where it was. The exit status is 1 when a run fails, or a row does not beat its baseline.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.architectures import document, schedule
from benchmarks.architectures.claims.catalog import CLAIMS
from benchmarks.architectures.claims.claim import Claim, Finished, Section
from benchmarks.architectures.compare import Compared, compare
from benchmarks.architectures.document import Machine
from benchmarks.architectures.gallery import gallery
from benchmarks.architectures.pictures import Picture
from benchmarks.architectures.rows import ROWS, Row
from benchmarks.architectures.runs import Run

FOLDER = Path("build/architectures")
DOCUMENT = Path("docs/architectures.md")
PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="one row or claim; the document stays as it is")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has kept")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where everything is kept")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="what is written")
    given = parser.parse_args()
    console = Console()
    names = [row.run.name for row in ROWS] + [claim.name for claim in CLAIMS]
    if unknown := set(given.only or ()) - set(names):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(names)}")
    wanted = given.only or names
    rows = [row for row in ROWS if row.run.name in wanted]
    claims = [claim for claim in CLAIMS if claim.name in wanted]
    if given.fresh:
        shutil.rmtree(given.folder, ignore_errors=True)
    with clock(given.folder / "seconds") as seconds:
        trained, failed, absent = schedule.train(needed(rows, claims), given.folder, console)
        compared = compare(rows, trained, given.folder, failed, console)
        finished = Finished(trained, given.folder)
        for claim in claims:
            if lacking := [run.name for run in claim.runs if run.name in absent]:
                absent[claim.name] = f"needs {lacking[0]}"
        sections = measured([one for one in claims if one.name not in absent], finished, failed, console)
        console.print(summary(compared))
        for section in sections:
            console.print(
                f"{'[green]as claimed' if section.holds else '[red]not in full as claimed'}[/]: {section.title}"
            )
        for name, why in failed.items():
            console.print(f"[red]{name}: {why}")
        for name, why in absent.items():
            console.print(f"[yellow]{name} is left out: {why}")
        if given.only is None:
            machine = machine_of(seconds() / 60.0)
            shown = gallery(finished)
            text = document.write(compared, sections, shown, {**failed, **absent}, machine)
            publish(given.document, text, [*shown, *(one for section in sections for one in section.pictures)])
            console.print(f"{given.document} is written, after {machine.minutes:.0f} minutes")
    return status(compared, failed)


def status(rows: Sequence[Compared], failed: Mapping[str, str]) -> int:
    """Of the process: 1 when something has failed or a row is behind its baseline."""
    return int(bool(failed) or not all(row.beats for row in rows))


def needed(rows: Sequence[Row], claims: Sequence[Claim]) -> list[Run]:
    """Every run once, those of the rows first; with --only also the runs that they need."""
    every = {
        run.name: run
        for run in (*(run for row in ROWS for run in row.runs()), *(run for one in CLAIMS for run in one.runs))
    }
    found: dict[str, Run] = {}

    def add(run: Run) -> None:
        for name in run.needs:
            add(every[name])
        found[run.name] = run

    for run in (*(run for row in rows for run in row.runs()), *(run for claim in claims for run in claim.runs)):
        add(run)
    return list(found.values())


def measured(claims: Sequence[Claim], finished: Finished, failed: dict[str, str], console: Console) -> list[Section]:
    """Of the claims whose runs are done. What goes wrong in one is added to `failed`, and costs the others nothing."""
    found = []
    for claim in claims:
        if lost := [run.name for run in claim.runs if run.name not in finished.trained]:
            failed[claim.name] = f"needs {', '.join(lost)}"
            continue
        try:
            with console.status(f"measuring {claim.name}"):
                found.append(claim.measure(finished))
        except Exception as error:
            console.print_exception()
            failed[claim.name] = f"{type(error).__name__}: {error}"
    return found


def publish(path: Path, text: str, pictures: Sequence[Picture]) -> None:
    """The document, and its pictures in a folder beside it."""
    folder = path.parent / document.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    for picture in pictures:
        (folder / picture.file).write_bytes(picture.content)


def summary(rows: Sequence[Compared]) -> Table:
    table = Table("row", "metric", "network", "baseline", "", "train s", "p50 ms", box=box.SIMPLE)
    for row in rows:
        table.add_row(
            row.title,
            row.metric,
            f"{row.figure:.4f}",
            f"{row.baseline_figure:.4f}",
            "" if row.beats else "[red]behind",
            f"{row.trained.seconds:.0f}",
            f"{row.latency.p50:.1f}",
        )
    return table


@contextmanager
def clock(path: Path) -> Iterator[Callable[[], float]]:
    """Seconds so far, with those of the runs before that were interrupted, which `path` keeps."""
    before = float(path.read_text()) if path.exists() else 0.0
    start = time.monotonic()

    def seconds() -> float:
        return before + time.monotonic() - start

    try:
        yield seconds
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(seconds()))


def machine_of(minutes: float) -> Machine:
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Machine(
        cores=os.cpu_count() or 1,
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        processes=schedule.processes(),
        minutes=minutes,
        versions=versions,
    )


if __name__ == "__main__":
    sys.exit(main())
