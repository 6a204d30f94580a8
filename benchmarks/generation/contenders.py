"""Who is measured: loops in processes of their own, and servers that are asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.generation.measured import Answer, Measured
from benchmarks.generation.prompts import Prompt

ROOT = Path(__file__).parents[2]

Measure = Callable[[Sequence[Sequence[Prompt]], int], Measured]


@dataclass(frozen=True)
class Contender:
    """settings: how it is set up, for the reader. measure: batches of prompts, and the tokens to generate for each,
    whatever they are. rounds: how many of them it takes part in, at each number of streams; None: in all."""

    name: str
    settings: str
    measure: Measure
    rounds: Mapping[int, int] | None = None

    def takes_part(self, streams: int, round_: int) -> bool:
        return self.rounds is None or round_ < self.rounds.get(streams, round_ + 1)


@contextmanager
def loop(
    name: str, python: Path, module: str, arguments: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> Iterator[Contender]:
    """A module of `benchmarks.generation.loops`, run by `python`."""
    command = [str(python), "-m", f"benchmarks.generation.loops.{module}", *arguments]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    surroundings.pop("OMP_NUM_THREADS", None)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=surroundings
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asks, answers = process.stdin, process.stdout

        def read() -> dict[str, Any]:
            line = answers.readline()
            if not line:
                raise RuntimeError(f"{name} ended with status {process.wait()}; run it to see why: {' '.join(command)}")
            found: dict[str, Any] = json.loads(line)
            return found

        def measure(batches: Sequence[Sequence[Prompt]], tokens: int) -> Measured:
            measured = Measured(tokens)
            for batch in batches:
                print(json.dumps({"prompts": [one.tokens for one in batch], "tokens": tokens}), file=asks, flush=True)
                found = read()
                if any(len(row) != tokens for row in found["tokens"]):
                    raise RuntimeError(f"{name} generated {[len(row) for row in found['tokens']]} tokens, not {tokens}")
                measured.seconds += max(found["last"])
                for first, last, row in zip(found["first"], found["last"], found["tokens"], strict=True):
                    measured.answers.append(Answer(first, last, decode(row)))
            return measured

        try:
            yield Contender(name, read()["settings"], measure)
        finally:
            asks.close()
            process.wait(timeout=60)


def over_http(port: int, body: Mapping[str, Any]) -> Measure:
    """Streamed completions, a connection a prompt. body: what every request has beside its prompt and the number of
    tokens."""

    def measure(batches: Sequence[Sequence[Prompt]], tokens: int) -> Measured:
        fixed = {**body, "stream": True, "temperature": 0, "max_tokens": tokens, "min_tokens": tokens}
        asked = {
            "path": "/v1/completions",
            "bodies": [[{**fixed, "prompt": prompt.text} for prompt in batch] for batch in batches],
        }
        command = [sys.executable, "-m", "benchmarks.generation.streams", "127.0.0.1", str(port)]
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=600, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"the load generator failed: {done.stderr.strip().splitlines()[-1]}")
        measured = Measured(tokens)
        for batch in json.loads(done.stdout)["batches"]:
            measured.seconds += batch["seconds"]
            for stream in batch["streams"]:
                if stream["tokens"] not in (None, tokens):
                    raise RuntimeError(f"the server generated {stream['tokens']} tokens, not {tokens}")
                measured.answers.append(Answer(stream["first"], stream["last"], stream["text"]))
        return measured

    return measure


@contextmanager
def listening(command: Sequence[str], ready: str) -> Iterator[int]:
    """A server, started with `--port` and one that is free; the port, once it answers at the path `ready`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    surroundings = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([*command, "--port", str(port)], stdout=quiet, stderr=quiet, cwd=ROOT, env=surroundings)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}{ready}").status_code == 200:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{' '.join(command)} does not answer; status {process.poll()}")
        yield port
    finally:
        process.terminate()
        process.wait()
