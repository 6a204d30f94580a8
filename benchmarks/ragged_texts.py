"""Texts of many lengths, batched with less and with more padding: python -m benchmarks.ragged_texts BUNDLE

BUNDLE: the folder of a version of a model that embeds texts, as `espalier export minilm-l6-v2` publishes it. 64 clients
ask for one text each, of 3 to 256 tokens (log-normal, median 27), all in this process. CPU time a text, one thread,
against batches in the order of arrival.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import numpy as np

from export.processing.inputs import TextInput
from server.metrics import Metrics
from server.runtime.deployment import Deployment
from server.runtime.model import Loaded, Model, load
from server.settings import Settings

TEXTS = 150
CLIENTS = 64
ROUNDS = 2
PADDINGS = (1.0, 0.4, 0.25, 0.15, 0.1, 0.05, 0.0)


def texts() -> list[list[int]]:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.3, 0.8, TEXTS).astype(int), 3, 256)
    return [random.integers(1000, 20000, length).tolist() for length in lengths]


async def measure(loaded: Loaded, settings: Settings, padding: float) -> tuple[float, float]:
    """CPU milliseconds a text, and texts a batch."""
    model = Model(loaded, Metrics(), settings)
    assert model.batcher is not None
    model.batcher.padding = padding
    if padding == 1.0:
        model.batcher.length = lambda row: 1  # as if all were alike: in the order of arrival
    rows = iter(texts())

    async def client() -> None:
        for row in rows:
            await model.submit([row], "embedding", deadline=time.perf_counter() + 3600).future

    start = time.process_time()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    seconds = time.process_time() - start
    batches = model.batcher.batches
    return 1e3 * seconds / TEXTS, batches.sum / sum(batches.counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    folder: Path = parser.parse_args().bundle
    settings = Settings(home=folder, parallel_runs=1, intra_op_threads=1)
    loaded = load(folder, settings, Deployment())
    assert isinstance(loaded.manifest.input, TextInput)
    first = 0.0
    for padding in PADDINGS:
        rounds = [asyncio.run(measure(loaded, settings, padding)) for _ in range(ROUNDS)]
        cost = min(cost for cost, _ in rounds)
        first = first or cost
        words = "in the order of arrival" if padding == 1.0 else f"at most {padding:4.0%} padding"
        print(f"{words:>23}: {cost:6.2f} ms CPU a text, {rounds[0][1]:4.1f} a batch, {first / cost:.2f} times as many")


if __name__ == "__main__":
    main()
