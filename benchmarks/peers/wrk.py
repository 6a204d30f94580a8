"""The load: wrk, which is C and cheap, out of Debian's package; our own generator where it cannot be had.

wrk counts an answer that was late once for every request that a steady client would have sent meanwhile
(coordinated omission), for all servers alike; our own does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

ROOT = Path(__file__).parents[2]
PACKAGES = ("wrk", "libluajit-5.1-2")
TIMEOUT = 60
DONE = """
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'MEASURED {"requests":%d,"microseconds":%d,"p50":%d,"p99":%d,',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99)))
  io.write(string.format(
    '"status":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d}\\n',
    errors.status, errors.connect, errors.read, errors.write, errors.timeout))
end
"""


class Request(NamedTuple):
    """One POST. headers: without the length."""

    path: str
    headers: Mapping[str, str]
    body: bytes


class Measured(msgspec.Struct, frozen=True):
    """rate: answers a second with status 200. p50, p99: of all answers, in ms. errors: answers with another status,
    refused or broken connections, timeouts."""

    rate: float
    p50: float
    p99: float
    errors: int


class Wrk(NamedTuple):
    """Of the package's files that lie in a folder."""

    binary: Path
    libraries: Path


def fetched(folder: Path) -> Wrk | None:
    """wrk in `folder`, or fetched into it from Debian's mirror; None where neither goes."""
    files = folder / "files"
    found = Wrk(files / "usr" / "bin" / "wrk", files / "usr" / "lib" / "x86_64-linux-gnu")
    try:
        if not found.binary.exists():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", *PACKAGES], check=True, capture_output=True, cwd=folder, timeout=120)
            for package in folder.glob("*.deb"):
                subprocess.run(["dpkg", "-x", package.name, "files"], check=True, capture_output=True, cwd=folder)
        found = found._replace(libraries=next(files.rglob("libluajit-5.1.so.2")).parent)
        # It ends with 1 when it is only asked for its version.
        said = subprocess.run([found.binary, "--version"], capture_output=True, text=True, env=environment(found))
        return found if said.stdout.startswith("wrk") else None
    except (OSError, StopIteration, subprocess.SubprocessError):
        return None


def environment(wrk: Wrk) -> dict[str, str]:
    return {**os.environ, "LD_LIBRARY_PATH": str(wrk.libraries)}


def script(request: Request, body: Path) -> str:
    """In Lua: sends the request with the content of the file `body`, and prints what was measured as JSON."""
    lines = [f"local file = io.open({quoted(str(body))}, 'rb')", "wrk.body = file:read('*a')", "file:close()"]
    lines += ["wrk.method = 'POST'", f"wrk.path = {quoted(request.path)}"]
    lines += [f"wrk.headers[{quoted(name)}] = {quoted(value)}" for name, value in request.headers.items()]
    return "\n".join(lines) + "\n" + DONE


def quoted(text: str) -> str:
    """A string of Lua's. JSON's are, for printable ASCII."""
    return json.dumps(text)


def read(printed: str) -> Measured:
    """What the script printed. Raises ValueError where it did not."""
    line = next((line for line in printed.splitlines() if line.startswith("MEASURED ")), None)
    if line is None:
        raise ValueError(f"wrk measured nothing: {printed.strip()[-500:]!r}")
    found: dict[str, Any] = json.loads(line.removeprefix("MEASURED "))
    broken = sum(found[name] for name in ("connect", "read", "write", "timeout"))
    return Measured(
        rate=1e6 * (found["requests"] - found["status"]) / found["microseconds"],
        p50=found["p50"] / 1e3,
        p99=found["p99"] / 1e3,
        errors=broken + found["status"],
    )


def load(wrk: Wrk | None, port: int, request: Request, connections: int, seconds: int, folder: Path) -> Measured:
    """One measurement. folder: where a script and a body may be written. Raises ValueError where nothing came back."""
    if wrk is None:
        return our_load(port, request, connections, seconds)
    body, lua = folder / "body", folder / "request.lua"
    body.write_bytes(request.body)
    lua.write_text(script(request, body))
    flags = ["-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={TIMEOUT}s", "-s", str(lua)]
    done = subprocess.run(
        [wrk.binary, *flags, f"http://127.0.0.1:{port}"],
        env=environment(wrk),
        capture_output=True,
        text=True,
        timeout=seconds + 2 * TIMEOUT,
    )
    return read(done.stdout + done.stderr)


def our_load(port: int, request: Request, connections: int, seconds: int) -> Measured:
    head = f"POST {request.path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(request.body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    command = [sys.executable, "-m", "benchmarks.load", "127.0.0.1", str(port), str(connections), str(seconds)]
    message = head.encode() + b"\r\n" + request.body
    done = subprocess.run(command, input=message, stdout=subprocess.PIPE, cwd=ROOT, timeout=seconds + 2 * TIMEOUT)
    if done.returncode:
        raise ValueError("the load generator failed")
    found = json.loads(done.stdout)
    if not found["latencies"]:
        raise ValueError("no answer came")
    p50, p99 = np.percentile(found["latencies"], [50, 99]) * 1e3
    return Measured((len(found["latencies"]) - found["errors"]) / found["seconds"], p50, p99, found["errors"])
