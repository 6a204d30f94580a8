"""What front-ends gain: python -m benchmarks.frontends [--frontends 0 1 2] [--connections 64] [--output FILE]

The same MLP 784-512-512-10, as JSON and as float32 bytes, served with as many front-ends as each of the numbers; all
servers are up at once and take turns. Beside requests a second stands the CPU time that a request costs in the
front-ends (front µs) and in the process that runs the models (model µs): on few cores, which the load shares, that is
what tells how the server behaves on many. "could" is what the busiest of its processes could do with a core of its own:
1 s over its CPU time a request. Front-ends stop gaining where the inference process is the busiest.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.serving import build, cpu_seconds, measure, request, sample, server

ROUNDS = 5


def front_ends(pid: int) -> list[int]:
    """Process ids of a server's front-ends."""
    found = [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return [child for child in found if b"server.frontends" in Path(f"/proc/{child}/cmdline").read_bytes()]


def measured(pid: int, port: int, connections: int, message: bytes) -> dict[str, float]:
    """As benchmarks.serving.measure, with the CPU time of front-ends beside that of the inference process."""
    fronts = front_ends(pid)
    before = [cpu_seconds(front) for front in fronts]
    found = measure(pid, port, connections, message)
    spent = [cpu_seconds(front) - since for front, since in zip(fronts, before, strict=True)]
    requests = found.pop("requests")
    found["front_us"] = 1e6 * sum(spent) / requests
    found["could"] = requests / max([*spent, found["server_us"] * requests / 1e6])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frontends", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="numbers to compare")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    vector = sample("mlp", 1)["vector"]
    in_json = json.dumps({"model": "mlp", "input": [round(float(x), 4) for x in vector[0]]}).encode()
    octets = "application/octet-stream"
    cases = [
        ("JSON", request("/v1/classify", "application/json", in_json)),
        ("float32", request("/v1/classify?model=mlp&top_k=1", octets, vector.tobytes())),
    ]
    console = Console()
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers, Progress(console=console) as progress:
        task = progress.add_task("rounds", total=ROUNDS * len(cases) * len(given.frontends))
        build(Path(folder) / "repository")
        up = {
            number: servers.enter_context(
                server(Path(folder) / f"home{number}", Path(folder) / "repository", f"--frontends={number}")
            )
            for number in given.frontends
        }
        for _ in range(ROUNDS):
            for words, message in cases:
                for number, (pid, port) in up.items():
                    one = measured(pid, port, given.connections, message)
                    rounds.setdefault((words, number), []).append(one)
                    progress.advance(task)
    figures: list[dict[str, float | str]] = [
        {"request": words, "frontends": number, **{name: median(one[name] for one in found) for name in found[0]}}
        for (words, number), found in sorted(rounds.items())
    ]
    console.print(table(figures, given.connections))
    if given.output is not None:
        given.output.write_text(json.dumps({"cores": os.cpu_count(), "figures": figures}, indent=1))


def table(figures: list[dict[str, float | str]], connections: int) -> Table:
    made = Table(
        *("body", "fronts", "req/s", "ratio", "p50", "p99 ms", "front µs", "model µs", "could"),
        caption=f"{connections} connections, medians of {ROUNDS} rounds on {os.cpu_count()} cores; µs: CPU time a "
        f"request; load: {median(float(one['load_us']) for one in figures):.0f} µs a request on the same cores",
        box=box.SIMPLE,
    )
    alone = {one["request"]: float(one["requests_per_second"]) for one in figures if one["frontends"] == 0}
    for one in figures:
        rate = float(one["requests_per_second"])
        made.add_row(
            str(one["request"]),
            str(one["frontends"]),
            f"{rate:,.0f}",
            f"{rate / alone[one['request']]:.2f}" if one["request"] in alone else "",
            *(f"{one[name]:.1f}" for name in ("p50_ms", "p99_ms")),
            *(f"{one[name]:.0f}" for name in ("front_us", "server_us")),
            f"{one['could']:,.0f}",
        )
    return made


if __name__ == "__main__":
    main()
