"""The API as any client would call it, with progress bars that follow the event stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class JobEndedBadly(Exception):
    """The job failed or was cancelled; the message is the server's."""


@dataclass(frozen=True)
class Answer:
    label: str
    probability: float
    seconds: float


def checked(response: httpx.Response) -> Any:
    """The JSON body; raises with the server's own words when the status is an error."""
    if response.is_error:
        response.read()
        raise RuntimeError(f"{response.request.url}: {response.status_code} {response.text}")
    return response.json()


def upload(client: httpx.Client, path: Path) -> dict[str, Any]:
    """POST /v1/files, then the validation report: {"id", "report"}."""
    with path.open("rb") as stream:
        file = checked(
            client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (path.name, stream)}, timeout=300)
        )
    report = checked(client.get(f"/v1/files/{file['id']}/report"))
    return {"id": file["id"], "report": report}


def events(client: httpx.Client, job_id: str) -> Iterator[dict[str, Any]]:
    """The job's events, from the first to the end of the job, as they happen (server-sent events)."""
    url = f"/v1/fine_tuning/jobs/{job_id}/events"
    with client.stream("GET", url, params={"stream": "true"}, timeout=None) as response:
        if response.is_error:
            response.read()
            checked(response)
        for line in response.iter_lines():
            if line.startswith("data:"):
                body = line[len("data:") :].strip()
                if body == "[DONE]":
                    return
                yield json.loads(body)


def fine_tune(client: httpx.Client, recipe: dict[str, Any], console: Console) -> dict[str, Any]:
    """POST /v1/fine_tuning/jobs and follow it to its end; the finished job. Raises JobEndedBadly."""
    job = checked(client.post("/v1/fine_tuning/jobs", json=recipe))
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("queued", total=None, figures="")
        for event in events(client, job["id"]):
            data = event.get("data") or {}
            if event["type"] == "metrics":
                figures = "  ".join(f"{k} {v:.4g}" for k, v in data.items() if k in SHOWN and v is not None)
                progress.update(bar, description="training", completed=data["step"], total=data.get("total_steps"))
                if figures:
                    progress.update(bar, figures=figures)
            else:
                progress.console.print(f"  [dim]{event['message']}")
        progress.update(bar, description="done")
    job = checked(client.get(f"/v1/fine_tuning/jobs/{job['id']}"))
    if job["status"] != "succeeded":
        raise JobEndedBadly(f"job {job['id']} {job['status']}: {(job.get('error') or {}).get('message', '')}")
    return dict(job)


SHOWN = ("train_loss", "samples_per_second", "validation_loss", "validation_accuracy")


def wait_until_served(client: httpx.Client, model: str, version: int, seconds: float = 30.0) -> None:
    """The server notices a published version by itself, within its polling interval."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        response = client.get(f"/v1/models/{model}")
        if response.status_code == 200 and response.json().get("version") == version:
            return
        time.sleep(0.2)
    raise RuntimeError(f"{model} version {version} is not served after {seconds:.0f} s")


def classify_all(
    send: Callable[[Any], httpx.Response], items: Sequence[Any], concurrency: int = 8
) -> tuple[list[Answer], float]:
    """One request an item, `concurrency` at once: the answers in order, and the seconds that all took."""

    def one(item: Any) -> Answer:
        start = time.perf_counter()
        first = checked(send(item))["data"][0]
        return Answer(first["label"], first["probability"], time.perf_counter() - start)

    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(one, items))
    return answers, time.perf_counter() - start
