"""ONNX Runtime alone: python -m benchmarks.peers.ceiling GRAPH CASE SECONDS

Prints samples a second at the best of some batch sizes and threads, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import onnxruntime

from benchmarks.peers.models import CASES, Case, output, sample
from server.process import cores

ROOT = Path(__file__).parents[2]
# Rows of a batch; those of a large network are slow to run, and on a CPU no faster.
BATCHES = {"mlp": (1, 8, 32, 64, 128), "efficientnet-lite0": (1, 4, 8), "minilm-l6-v2": (1, 4, 16)}


class Ceiling(NamedTuple):
    """samples: a second. rows: of a batch. runs: side by side. threads: of each run."""

    samples: float
    rows: int
    runs: int
    threads: int


def ceiling(graph: Path, case: Case, seconds: float) -> Ceiling:
    """Either all cores share one run, or every core has runs of its own."""
    settings = dict.fromkeys([(1, cores()), (cores(), 1)])
    tries = [(rows, runs, threads) for runs, threads in settings for rows in BATCHES[case.model]]
    found = []
    for runs, threads in settings:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        for rows in BATCHES[case.model]:
            rate = measured(session, case, rows, runs, seconds / len(tries))
            found.append(Ceiling(rate, rows, runs, threads))
    return max(found)


def measured(session: onnxruntime.InferenceSession, case: Case, rows: int, runs: int, seconds: float) -> float:
    """Samples a second, by so many threads that each run one batch after the other."""
    inputs, outputs = sample(case, rows), [output(case)]
    session.run(outputs, inputs)
    done = [0] * runs
    start = time.perf_counter()

    def run(thread: int) -> None:
        while time.perf_counter() - start < seconds:
            session.run(outputs, inputs)
            done[thread] += rows

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start)


def isolated(graph: Path, case: Case, seconds: float) -> Ceiling:
    """In a process of its own, so that nothing of this one slows it."""
    command = [sys.executable, "-m", "benchmarks.peers.ceiling", str(graph), case.name, str(seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    return Ceiling(*json.loads(done.stdout))


if __name__ == "__main__":
    where, name, seconds = sys.argv[1:]
    case = next(case for case in CASES if case.name == name)
    print(json.dumps(ceiling(Path(where), case, float(seconds))))
