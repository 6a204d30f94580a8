"""Starts the server as its own process, or finds the one that already runs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx


class NotOurServer(Exception):
    """The port answers, but not as Espalier does."""


def running(url: str) -> bool:
    """Whether an Espalier server answers at `url`. Raises NotOurServer when something else does."""
    try:
        answer = httpx.get(f"{url}/health/ready", timeout=5)
    except httpx.TransportError:
        return False
    if "espalier" not in answer.text:
        raise NotOurServer(f"{url} is taken by another program; stop it, or set ESPALIER_PORT")
    return answer.status_code == 200


def start(url: str, log: Path, seconds: float = 30.0) -> int | None:
    """Start `espalier serve` so that it outlives this process; its pid, or None when it was running already.

    Raises RuntimeError with the end of the server's log when it is not ready in time.
    """
    if running(url):
        return None
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("espalier")), "serve"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if running(url):
            return process.pid
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"the server did not become ready; the end of {log}:\n{log.read_text()[-2000:]}")
