"""What keys, limits and traces cost a request, in CPU time of the server: python -m benchmarks.access_cost [--rounds 7]

One server a way, all serving the same tiny network (8 numbers, one row a request, JSON), so that what is around it is
most of the cost. They take turns under the same load; of each turn the processor time of the server's process (user and
system, all threads) is divided by the requests that it answered; the median of the turns counts. Processor time, so
that other work on the machine shows less than in any clock; the ratio is to the server without keys and traces, turn by
turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.serving import server
from finetune.jobs.store import opened
from server.keys import KeyStore, Limits, Scope
from server.settings import Settings

FEATURES = 8
CONNECTIONS = 16
SECONDS = 1.5
KEYS = {
    "a key": Limits(),
    "a key with rates": Limits(requests_per_minute=10**8, tokens_per_minute=10**8),
    "a key with rates and quotas": Limits(requests_per_minute=10**8, requests_per_day=10**9, tokens_per_month=10**9),
}


class Collector(BaseHTTPRequestHandler):
    """Takes what is sent and forgets it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def build(repository: Path) -> None:
    import numpy as np

    from export.bundle import Lineage
    from export.bundling import bundle
    from export.processing.inputs import VectorInput
    from models import registry
    from models.spec import Classification, ModelSpec

    spec = ModelSpec(architecture="mlp", hyperparameters={"features": FEATURES, "hidden": [8]}, task=Classification(2))
    bundle(
        registry.build(spec),
        name="tiny",
        repository=repository,
        input=VectorInput(features=FEATURES),
        labels=["a", "b"],
        tokenizer=None,
        validation=[{"vector": np.zeros((4, FEATURES), np.float32)}],
        metrics={},
        evaluation=None,
        lineage=Lineage(base_model="mlp"),
    )


def key(home: Path, limits: Limits) -> str:
    with opened(Settings(home=home).database) as store:
        return KeyStore(store).create("load", [Scope.INFER], limits)[0]


def request(secret: str) -> bytes:
    body = json.dumps({"model": "tiny", "input": [0.5] * FEATURES}).encode()
    sent = f"authorization: Bearer {secret}\r\n" if secret else ""
    head = (
        f"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{sent}content-length: {len(body)}"
    )
    return head.encode() + b"\r\n\r\n" + body


def cost(process: psutil.Process, port: int, sent: bytes) -> float:
    """Microseconds of CPU that a request takes the server."""
    before = process.cpu_times()
    command = [sys.executable, "-m", "benchmarks.load", "127.0.0.1", str(port), str(CONNECTIONS), str(SECONDS)]
    found = json.loads(subprocess.run(command, input=sent, capture_output=True, check=True).stdout)
    after = process.cpu_times()
    if found["errors"]:
        sys.exit(f"{found['errors']} requests were not answered with 200")
    return float((after.user + after.system - before.user - before.system) / len(found["latencies"]) * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    traced = ["--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}", "--trace-share"]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as open_servers:
        folder = Path(temporary)
        build(folder / "repository")
        ways: dict[str, tuple[psutil.Process, int, bytes]] = {}

        def add(name: str, flags: list[str], secret: str = "") -> None:
            home = folder / name.replace(" ", "-")
            process, port = open_servers.enter_context(server(home, folder / "repository", *flags))
            ways[name] = (psutil.Process(process), port, request(secret))

        add("neither", [])
        for name, limits in KEYS.items():
            add(name, ["--auth", "on"], key(folder / name.replace(" ", "-"), limits))
        add("1 % traced", [*traced, "0.01"])
        add("all traced", [*traced, "1"])
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, way in ways.items():
                spent = cost(*way)
                if turn:  # the first warms up
                    found[name].append(spent)
    table = Table("", "µs of CPU a request", "more", "ratio", box=box.MARKDOWN)
    for name, times in found.items():
        ratio = median(one / other for one, other in zip(times, found["neither"], strict=True))
        more = median(one - other for one, other in zip(times, found["neither"], strict=True))
        table.add_row(name, f"{median(times):.1f}", f"{more:+.1f}", f"{ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
