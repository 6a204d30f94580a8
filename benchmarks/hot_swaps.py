"""Hot swaps under load: python -m benchmarks.hot_swaps [--swaps 100] [--connections 32]

Every version of the model answers its own number, whatever it is asked, so an answer shows which version made it. Two
kinds of swaps, each under closed-loop clients: a new version is published and takes the place of the old one; and an
alias is moved to and fro between two versions. Printed for each: requests, failures, wrong answers and latencies,
beside those of the same clients with no swaps. Wrong is a number that is not that of the version which the answer
names; a version older than one that was seen before the request was sent; and after the answer to the move of an alias
another version than its new one. Ends with status 1 for any failure or wrong answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import uvloop
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from benchmarks.serving import server
from export.bundle import Lineage, Manifest, Parity, TensorSpec
from export.processing.inputs import VectorInput
from export.publish import publish
from export.staging import staging

NAME = "numbers"
FEATURES = 4


def publish_number(repository: Path, number: int) -> int:
    """A model that answers `number`, as the next version; which that is."""
    nodes = [
        helper.make_node("MatMul", ["vector", "nothing"], ["zero"]),
        helper.make_node("Add", ["zero", "number"], ["value"]),
    ]
    vector = helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", FEATURES])
    value = helper.make_tensor_value_info("value", TensorProto.FLOAT, ["batch", 1])
    weights = [
        numpy_helper.from_array(np.zeros((FEATURES, 1), np.float32), "nothing"),
        numpy_helper.from_array(np.array([number], np.float32), "number"),
    ]
    graph = helper.make_graph(nodes, NAME, [vector], [value], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with staging(repository) as folder:
        onnx.save(model, folder / "model.onnx")
        draft = Manifest(
            name=NAME,
            version=0,
            created_at=datetime.now(UTC),
            task="regression",
            input=VectorInput(features=FEATURES),
            inputs=[TensorSpec(name="vector", dtype="float", shape=["batch", FEATURES], unit="1")],
            outputs=[TensorSpec(name="value", dtype="float", shape=["batch", 1], unit="1")],
            labels=["number"],
            model={"architecture": "mlp", "hyperparameters": {}},
            parity=Parity(samples=1, largest_difference=0.0, tolerance=1e-4, top1_disagreements=0, batch_sizes=[1]),
            lineage=Lineage(base_model="mlp"),
            files={},
        )
        return publish(folder, repository, draft).version


@dataclass
class Load:
    """What clients that ask for `reference` have seen. floor: no answer to a request that is sent now may be of an
    older version. allowed: versions that may answer now, None: any. latencies: seconds."""

    port: int
    reference: str
    floor: int = 0
    allowed: frozenset[int] | None = None
    newest: int = 0
    requests: int = 0
    failures: int = 0
    wrong: int = 0
    latencies: list[float] = field(default_factory=list)
    going: bool = True

    async def client(self) -> None:
        """One connection, one request at a time."""
        body = json.dumps({"model": self.reference, "input": [0.5] * FEATURES}).encode()
        head = f"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while self.going:
            floor, allowed, start = self.floor, self.allowed, time.perf_counter()
            writer.write(head.encode() + b"\r\n\r\n" + body)
            status, content = await answer_of(reader)
            self.latencies.append(time.perf_counter() - start)
            self.requests += 1
            if status != 200:
                self.failures += 1
                continue
            found = json.loads(content)
            version = found["version"]
            self.newest = version
            right = found["data"][0]["values"]["number"] == version
            if allowed is None or self.allowed is None:
                right = right and version >= floor
                self.floor = max(self.floor, version)
            else:
                right = right and version in allowed | self.allowed
            self.wrong += not right
        writer.close()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return int(head[9:12]), await reader.readexactly(length)


async def ask(port: int, method: str, path: str, content: object) -> None:
    """Raises RuntimeError for another status than 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(content).encode()
    writer.write(f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    status, answer = await answer_of(reader)
    writer.close()
    if status != 200:
        raise RuntimeError(f"{method} {path}: {status} {answer.decode()}")


async def under_load(load: Load, connections: int, swaps: Callable[[], Awaitable[None]]) -> Load:
    """Do the swaps while clients ask."""
    clients = [asyncio.create_task(load.client()) for _ in range(connections)]
    try:
        await swaps()
    finally:
        load.going = False
        await asyncio.gather(*clients)
    return load


async def new_versions(load: Load, repository: Path, swaps: int) -> None:
    for _ in range(swaps):
        version = await asyncio.to_thread(publish_number, repository, load.newest + 1)
        while load.newest < version:  # noqa: ASYNC110 - answers tell
            await asyncio.sleep(0.005)


async def alias_moves(load: Load, versions: tuple[int, int], moves: int) -> None:
    """Between two versions, of which it means the second one now."""
    path = f"/v1/models/{NAME}/aliases/production"
    for move in range(moves):
        version = versions[move % 2]
        load.allowed = frozenset(versions)
        await ask(load.port, "PUT", path, {"version": version})
        load.allowed = frozenset({version})
        await asyncio.sleep(0.02)


async def measured(port: int, repository: Path, swaps: int, connections: int) -> dict[str, Load]:
    found = {}

    async def nothing() -> None:
        await asyncio.sleep(max(1.0, 0.05 * swaps))

    found["no swaps"] = await under_load(Load(port, NAME), connections, nothing)
    load = Load(port, NAME, newest=1)
    found[f"{swaps} new versions"] = await under_load(load, connections, lambda: new_versions(load, repository, swaps))
    last = found[f"{swaps} new versions"].newest
    await ask(port, "PUT", f"/v1/models/{NAME}/aliases/production", {"version": last - 1})
    moved = Load(port, f"{NAME}@production", allowed=frozenset({last, last - 1}))
    found[f"{swaps} moves of an alias"] = await under_load(
        moved, connections, lambda: alias_moves(moved, (last, last - 1), swaps)
    )
    return found


def table(found: dict[str, Load]) -> Table:
    shown = Table("", "requests", "failed", "wrong", "p50 ms", "p99 ms", "longest ms")
    for name, load in found.items():
        p50, p99, most = np.percentile(load.latencies, [50, 99, 100]) * 1e3
        counts = [f"{load.requests:,}", str(load.failures), str(load.wrong)]
        shown.add_row(name, *counts, f"{p50:.2f}", f"{p99:.2f}", f"{most:.1f}")
    return shown


def run(swaps: int, connections: int) -> dict[str, Load]:
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        publish_number(repository, 1)
        with server(Path(folder) / "home", repository, "--poll-seconds", "0.05") as (_, port):
            found: dict[str, Load] = uvloop.run(measured(port, repository, swaps, connections))
            return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--connections", type=int, default=32)
    given = parser.parse_args()
    found = run(given.swaps, given.connections)
    console = Console()
    console.print(table(found))
    console.print(f"{given.connections} connections, {os.cpu_count()} cores for clients and server together")
    return int(any(load.failures or load.wrong for load in found.values()))


if __name__ == "__main__":
    sys.exit(main())
