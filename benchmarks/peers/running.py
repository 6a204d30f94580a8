"""A contender's server, started for one model, checked and measured."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
import psutil

from benchmarks.peers.contenders import Answer, Contender, Reply, Settings, Start, Winner
from benchmarks.peers.models import Case, graph, output, sample

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
SETTLE_SECONDS = 15


class Unfit(Exception):
    """Why a server cannot be measured, in words."""


class Running:
    """port: of its HTTP. processes: the server's, with all that it has started."""

    def __init__(self, port: int, process: int, log: Path) -> None:
        self.port, self.log = port, log
        top = psutil.Process(process)
        self.processes = [top, *top.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """What they have used so far."""
        found = 0.0
        for process in self.processes:
            with suppress(psutil.Error):
                times = process.cpu_times()
                found += times.user + times.system
        return found

    def settle(self) -> None:
        """Wait until what was asked and given up is no longer worked on."""
        until = time.monotonic() + SETTLE_SECONDS
        before = self.cpu_seconds()
        while time.monotonic() < until:
            time.sleep(0.2)
            now = self.cpu_seconds()
            if now - before <= 0.04:  # what they use while nothing is asked
                return
            before = now


@contextmanager
def running(contender: Contender, python: Path, repository: Path, model: str, settings: Settings) -> Iterator[Running]:
    """Its server with one model. Raises Unfit where it does not start."""
    port = free_ports()
    with tempfile.TemporaryDirectory() as home, (Path(home) / "log").open("wb") as log:
        start = Start(python, model, repository, port, settings, Path(home))
        command, more = contender.command(start)
        # pip, the shell and the tests set it, for themselves.
        kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment = {**kept, "PYTHONPATH": str(ROOT), **more}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait(contender, process, port, Path(home) / "log")
            yield Running(port, process.pid, Path(home) / "log")
        finally:
            end(process)


def free_ports() -> int:
    """The first of two that are free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, suppress(OSError):
            port: int = first.getsockname()[1]
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


def wait(contender: Contender, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}{contender.ready}", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise Unfit(f"{contender.name} does not start: {last(log)}")


def last(log: Path) -> str:
    """Of what a server wrote."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-600:]


def end(process: subprocess.Popen[bytes]) -> None:
    """The server and what it started."""
    started: list[psutil.Process] = []
    with suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(started, timeout=3)
    for one in left:
        with suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(left, timeout=10)


def expected(repository: Path, case: Case) -> np.ndarray:
    """What ONNX Runtime alone says of the sample: float32 [width]."""
    session = onnxruntime.InferenceSession(str(graph(repository, case.model)), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run([output(case)], sample(case))[0][0]
    return found


def check(contender: Contender, running: Running, case: Case, settings: Settings, right: np.ndarray) -> None:
    """Raises Unfit where a server does not say what ONNX Runtime says."""
    request = contender.request(case, settings)
    url = f"http://127.0.0.1:{running.port}{request.path}"
    try:
        got = httpx.post(url, content=request.body, headers=dict(request.headers), timeout=60)
    except httpx.HTTPError as error:
        raise Unfit(f"{contender.name} does not answer {request.path}: {error!r}") from error
    if got.status_code != 200:
        raise Unfit(f"{contender.name} answers {request.path} with {got.status_code}: {got.text[:300]}")
    try:
        answer = contender.answer(
            case, Reply({name.lower(): value for name, value in got.headers.items()}, got.content)
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Unfit(f"{contender.name} answers {request.path} with {got.content[:200]!r}: {error!r}") from error
    if not agrees(case, answer, right):
        raise Unfit(f"{contender.name} says {answer} where ONNX Runtime says {right}")


def agrees(case: Case, answer: Answer, right: np.ndarray) -> bool:
    """Whether an answer is what the graph gives, to float32's last digits. Vectors count by their direction."""
    if isinstance(answer, Winner):
        likely = np.exp(right - right.max())
        likely /= likely.sum()
        return answer.label == int(likely.argmax()) and abs(answer.probability - float(likely.max())) < 1e-3
    if answer.shape != right.shape:
        return False
    if case.tokens:
        return float(answer @ right / (np.linalg.norm(answer) * np.linalg.norm(right))) > 1 - 1e-5
    return bool(np.allclose(answer, right, rtol=1e-3, atol=1e-3))
