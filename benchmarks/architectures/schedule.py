"""Runs side by side, one thread each, in processes of their own, with progress."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.architectures import runs
from benchmarks.architectures.data import Missing
from benchmarks.architectures.runs import Run, Trained
from finetune.run_request import JobFailed

MOST_PROCESSES = 4
POLL_SECONDS = 0.2
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# What a run tells: its name, stage, steps done, steps in all, figures.
Telling = tuple[str, str, int, int, str]
tellings: queue.Queue[Telling]


def processes() -> int:
    """How many runs there are at once."""
    return max(1, min(os.cpu_count() or 1, MOST_PROCESSES))


def begin(channel: queue.Queue[Telling]) -> None:
    """Of each process."""
    global tellings
    tellings = channel
    import torch

    torch.set_num_threads(1)


def do(one: Run, folder: Path) -> Trained:
    return runs.do(one, folder, lambda *told: tellings.put((one.name, *told)))


def train(
    all_of: Sequence[Run], folder: Path, console: Console
) -> tuple[dict[str, Trained], dict[str, str], dict[str, str]]:
    """What is kept of each run, by its name, why others have failed, and what data the rest lack. A run begins when
    those that it needs are done."""
    done: dict[str, Trained] = {}
    failed: dict[str, str] = {}
    absent: dict[str, str] = {}
    waiting = {one.name: one for one in all_of}
    os.environ.update(THREADS)
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        Shown(console, len(waiting)) as shown,
        ProcessPoolExecutor(processes(), context, begin, (channel := manager.Queue(),)) as pool,
    ):
        running: dict[Future[Trained], Run] = {}
        while waiting or running:
            for one in list(waiting.values()):
                lost = [name for name in one.needs if name in failed or name in absent]
                if lost:
                    why = failed if lost[0] in failed else absent
                    why[waiting.pop(one.name).name] = f"needs {lost[0]}, which is not there"
                elif len(running) < processes() and all(name in done for name in one.needs):
                    running[pool.submit(do, waiting.pop(one.name), folder)] = one
            finished, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
            shown.listen(channel)
            for future in finished:
                one = running.pop(future)
                try:
                    done[one.name] = future.result()
                    shown.end(one.name, f"{done[one.name].seconds:.0f} s")
                except Missing as error:
                    absent[one.name] = str(error)
                    shown.end(one.name, f"[yellow]{error}")
                except (JobFailed, ValueError) as error:
                    failed[one.name] = str(error)
                    shown.end(one.name, f"[red]{error}")
    return done, failed, absent


class Shown:
    """A bar for all runs, and one for each that is running."""

    def __init__(self, console: Console, total: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
            TextColumn("[dim]{task.fields[figures]}"),
            console=console,
        )
        self.all = self.progress.add_task("all runs", total=total, figures="")
        self.bars: dict[str, TaskID] = {}

    def __enter__(self) -> Shown:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def listen(self, channel: queue.Queue[Telling]) -> None:
        while not channel.empty():
            name, stage, step, steps, figures = channel.get()
            if name not in self.bars:
                self.bars[name] = self.progress.add_task(name, total=None, figures="")
            told: dict[str, Any] = {"completed": step, "total": steps} if steps else {}
            self.progress.update(self.bars[name], figures=f"{stage} {figures}", **told)

    def end(self, name: str, words: str) -> None:
        if name in self.bars:
            self.progress.remove_task(self.bars.pop(name))
        self.progress.advance(self.all)
        self.progress.console.print(f"  {name}: {words}", highlight=False)
