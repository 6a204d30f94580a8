"""What the batcher itself costs a request, in CPU time: python -m benchmarks.batcher_cost

Requests of some rows each are queued together on a uvloop, batched, "run" by a function that answers at once, and
awaited; the loop's own cost of one awaited future is taken off. CPU time of the process, so that other work on the
machine does not show; the median of the rounds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from statistics import median

import numpy as np
import uvloop

from server.histograms import Distribution
from server.metrics import ROWS, SECONDS
from server.runtime.batcher import Batcher, Block, Value, Wanted
from server.runtime.runs import Runs

REQUESTS = 64
REPEATS = 200
ROUNDS = 15
FEATURES = 784


def run(blocks: list[Block], wanted: set[Wanted]) -> dict[Wanted, Value]:
    return dict.fromkeys(wanted, ANSWER[: sum(map(len, blocks))])


ANSWER = np.zeros((4096, 10), np.float32)


async def cost(turn: Callable[[], Awaitable[None]]) -> float:
    """CPU seconds of one of REQUESTS."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(REPEATS):
            await turn()
        times.append((time.process_time() - start) / REPEATS / REQUESTS)
    return median(times)


async def measure(parallel: int, rows: int, gone: Callable[[], bool] | None) -> float:
    """CPU seconds a request."""
    batcher = Batcher(
        run,
        max_batch_size=64,
        max_queue_delay=0.0,
        queue_limit=100_000,
        queue_bytes=10**10,
        parallel=parallel,
        length=None,
        batches=Distribution(ROWS),
        queue_seconds=Distribution(SECONDS),
        inference_seconds=Distribution(SECONDS),
        runs=Runs(),
        refused=lambda reason: None,
    )
    block = np.zeros((rows, FEATURES), np.float32)
    later = time.perf_counter() + 3600
    loop = asyncio.get_running_loop()

    async def queued() -> None:
        tickets = [batcher.submit(block, "classify", deadline=later, gone=gone) for _ in range(REQUESTS)]
        for ticket in tickets:
            await ticket.future

    async def bare() -> None:
        futures = [loop.create_future() for _ in range(REQUESTS)]

        def finish() -> None:
            for future in futures:
                future.set_result(None)

        loop.call_soon(finish)
        for future in futures:
            await future

    return await cost(queued) - await cost(bare)


async def main() -> None:
    for words, parallel in (("on the loop", 0), ("on a thread", 1)):
        for rows in (1, 8):
            seconds = await measure(parallel, rows, lambda: False)
            print(f"{REQUESTS} requests of {rows} rows, {words}: {seconds * 1e6:.2f} µs a request")


if __name__ == "__main__":
    uvloop.run(main())
