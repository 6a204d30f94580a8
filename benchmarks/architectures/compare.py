"""Each row against its baseline, on the same test items, and asked over HTTP."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.progress import track

from benchmarks.architectures import data, runs
from benchmarks.architectures.held_out import HeldOut, held_out
from benchmarks.architectures.rows import Figure, Measure, Row
from benchmarks.architectures.runs import Trained
from benchmarks.architectures.serving import Latency, latency
from benchmarks.serving import server
from export.bundle import read_manifest


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """A row as the document shows it. figure and baseline_figure: the metric on the test items."""

    title: str
    task: str
    data: str
    metric: str
    better: str
    figure: float
    baseline: str
    baseline_figure: float
    trained: Trained
    latency: Latency

    @property
    def beats(self) -> bool:
        ahead = self.figure - self.baseline_figure
        return ahead > 0.0 if self.better == "more" else ahead < 0.0


def compare(
    rows: Sequence[Row], trained: Mapping[str, Trained], folder: Path, failed: dict[str, str], console: Console
) -> list[Compared]:
    """The rows whose runs are done. Why the server does not answer one is added to `failed`."""
    done = [row for row in rows if all(run.name in trained for run in row.runs())]
    figures: dict[tuple[str, Measure, str], float] = {}

    def figure(row: Row, reference: Measure | Figure, items: HeldOut) -> float:
        if isinstance(reference, Figure):
            return trained[(reference.run or row.run).name].metrics[reference.name]
        same = (row.run.file, reference, repr((row.run.recipe.data, row.run.recipe.seed)))
        if same not in figures:
            figures[same] = reference(items)
        return figures[same]

    found: list[Compared] = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        server(Path(temporary), served(done, folder, Path(temporary))) as (
            pid,
            port,
        ),
    ):
        for row in track(done, "baselines, and requests over HTTP", console=console):
            one = trained[row.run.name]
            items = held_out(data.prepared(row.run.file, runs.files(folder)), row.run.recipe)
            words = row.baseline
            if row.also is not None:
                words += f" ({row.also[0]}: {figure(row, row.also[1], items):.3f})"
            try:
                asked = latency(pid, port, read_manifest(one.bundle(folder)), content(items))
            except (RuntimeError, httpx.HTTPError) as error:
                failed[row.run.name] = str(error)
                continue
            found.append(
                Compared(
                    title=row.title,
                    task=row.task,
                    data=row.data,
                    metric=row.metric,
                    better=row.better,
                    figure=one.metrics[row.metric],
                    baseline=words,
                    baseline_figure=figure(row, row.measure, items),
                    trained=one,
                    latency=asked,
                )
            )
    return found


def served(rows: Sequence[Row], folder: Path, home: Path) -> Path:
    """A repository of the rows alone, without the runs of the claims."""
    repository = home / "repository"
    repository.mkdir()
    for row in rows:
        (repository / row.run.name).symlink_to((runs.repository(folder) / row.run.name).resolve())
    return repository


def content(items: HeldOut) -> Any:
    """A test item to ask about: of those with a length, the one in the middle."""
    contents = items.test.contents[:101]
    if isinstance(contents[0], bytes) or not hasattr(contents[0], "__len__"):
        return contents[0]
    return sorted(contents, key=len)[len(contents) // 2]
