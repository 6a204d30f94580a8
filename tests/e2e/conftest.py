"""A live server for each file of tests, and what a job on it publishes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.client import events
from export import bundle
from export.bundle import Manifest
from export.untouched import export_backbone
from server.settings import Settings
from tests.server.conftest import Live, client, running

__all__ = ["client"]  # a fixture here, too


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(Settings(home=tmp_path_factory.mktemp("home"), port=0, poll_seconds=0.2)) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with SmolLM2-135M-Instruct as "smollm2", exported once for all tests: that takes a minute."""
    repository = tmp_path_factory.mktemp("smollm2")
    export_backbone("smollm2-135m-instruct", name="smollm2", repository=repository, backbones={})
    return repository


def published_file(live: Live, filename: str, content: bytes, **recipe: Any) -> Manifest:
    """What a job that learns from a file publishes, when it is served."""
    body = {"training_file": live.file_id(filename, content), "seed": 3, **recipe}
    job = live.client.post("/v1/fine_tuning/jobs", json=body)
    assert job.status_code == 200, job.text
    messages = [event["message"] for event in events(live.client, job.json()["id"])]
    found = live.client.get(f"/v1/fine_tuning/jobs/{job.json()['id']}").json()
    assert found["status"] == "succeeded", messages
    name = recipe["name"]
    deadline = time.monotonic() + 60
    while name not in [model["id"] for model in live.client.get("/v1/models").json()["data"]]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return bundle.verify(Path(live.settings.repository) / name / "1")


def published(live: Live, rows: list[dict[str, Any]], **recipe: Any) -> Manifest:
    """The same of a job that learns from `rows`."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return published_file(live, "rows.jsonl", content, **recipe)
