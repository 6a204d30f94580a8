"""Prometheus as a process of this machine, with the configuration and the rules of this folder but its own targets."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FOLDER = Path(__file__).parent
UNPACKED = Path(sys.prefix) / "prometheus" / "usr" / "bin"


def program(name: str) -> str | None:
    """name: "prometheus" or "promtool". Where fetch.sh unpacked it, or where it is installed; None: nowhere."""
    return shutil.which(name, path=UNPACKED) or shutil.which(name)


class Series(NamedTuple):
    """times: Unix seconds. values: one each; none of them is NaN."""

    labels: dict[str, str]
    times: list[float]
    values: list[float]


class RefusedQuery(ValueError):
    """PromQL that Prometheus cannot read; the message is its own."""


class Prometheus:
    """The API of one at `address`."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, **fields: str) -> Any:
        """`data` of an answer. Raises RefusedQuery."""
        try:
            with urllib.request.urlopen(f"{self.address}{path}?{urllib.parse.urlencode(fields)}", timeout=30) as answer:  # noqa: S310
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RefusedQuery(f"{fields}: {error.read().decode(errors='replace')}") from error

    def over(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        """What `expr` is from `start` to `end`, Unix seconds. Raises RefusedQuery."""
        fields = {"query": expr, "start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:g}"}
        found = self.get("/api/v1/query_range", **fields)["result"]
        return [_series(one["metric"], one["values"]) for one in found]

    def at(self, expr: str, moment: float | None = None) -> list[Series]:
        """What `expr` is at a moment, or now. Raises RefusedQuery."""
        fields = {} if moment is None else {"time": f"{moment:.3f}"}
        found = self.get("/api/v1/query", query=expr, **fields)
        if found["resultType"] == "scalar":
            return [_series({}, [found["result"]])]
        return [_series(one["metric"], [one["value"]]) for one in found["result"]]


def _series(labels: dict[str, str], points: list[list[Any]]) -> Series:
    kept = [(moment, number) for moment, text in points if not math.isnan(number := float(text))]
    return Series(labels, [moment for moment, _ in kept], [number for _, number in kept])


@contextmanager
def running(folder: Path, targets: Sequence[str], *, interval: str = "1s", key: str = "") -> Iterator[Prometheus]:
    """Prometheus with its data in `folder`. targets: host:port of servers. interval: between scrapes, and between
    evaluations of rules. key: for servers that ask for one."""
    binary = program("prometheus")
    assert binary is not None, "no prometheus here; deploy/prometheus/fetch.sh unpacks it"
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), interval)
    config["rule_files"] = [str(FOLDER / "rules" / "*.yml")]
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] == "espalier"]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": list(targets)}]
    if key:
        job["authorization"] = {"credentials": key}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        binary,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={listen}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        _wait(f"http://{listen}/-/ready", process, log)
        yield Prometheus(f"http://{listen}")
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):  # noqa: S310
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
