"""Which settings suit a peer: python -m benchmarks.peers.tuning NAME MODEL '{"workers": [1, 2], "batch": [1, 32]}'

Tries every combination of the values over those in `contenders`, for a few seconds each, and prints requests a second
at 1 and 64 connections.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.environments import environment
from benchmarks.peers.contenders import contenders
from benchmarks.peers.folder import KEPT
from benchmarks.peers.models import CASES, publish
from benchmarks.peers.running import Unfit, check, expected, running
from benchmarks.peers.wrk import fetched, load

CONNECTIONS = (1, 64)


def main() -> None:
    name, model, values = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    console = Console(width=200)
    repository = KEPT / "models"
    publish(repository, [model], console.print)
    contender = next(one for one in contenders(repository) if one.name == name)
    python = environment(KEPT / name.lower().replace(" ", "-"), contender.packages) if contender.packages else Path()
    wrk = fetched(KEPT / "wrk")
    cases = [case for case in CASES if case.model == model]
    right = {case.name: expected(repository, case) for case in cases}
    for chosen in itertools.product(*values.values()):
        settings = {**contender.settings[model], **dict(zip(values, chosen, strict=True))}
        console.print(json.dumps(settings), markup=False)
        try:
            with running(contender, python, repository, model, settings) as server, tempfile.TemporaryDirectory() as at:
                for case in cases:
                    check(contender, server, case, settings, right[case.name])
                    request = contender.request(case, settings)
                    load(wrk, server.port, request, 16, 1, Path(at))
                    for connections in CONNECTIONS:
                        server.settle()
                        before = server.cpu_seconds()
                        found = load(wrk, server.port, request, connections, 2, Path(at))
                        used = (server.cpu_seconds() - before) / max(found.rate * 2, 1)
                        console.print(
                            f"  {case.name:12} {connections:4}: {found.rate:7.0f}/s  p50 {found.p50:7.2f}  "
                            f"p99 {found.p99:7.2f} ms  {found.errors} errors  {1e6 * used:.0f} µs CPU"
                        )
        except (Unfit, ValueError) as error:
            console.print(f"  {error}", markup=False)


if __name__ == "__main__":
    main()
