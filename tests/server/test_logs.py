"""Lines of the log of a server: what belongs to a request says to which."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.keys import KeyStore, Limits, Scope
from server.logs import JsonLines
from tests.server.bundles import publish_vectors
from tests.server.conftest import Start, message_of

POINT = {"model": "points", "input": [0.5, 1.0]}


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What is logged, as JSON lines."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel("INFO")
    yield written
    root.removeHandler(handler)
    root.setLevel(level)


def of_request(lines: io.StringIO, request_id: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in lines.getvalue().splitlines()]
    return [line for line in found if line.get("request_id") == request_id]


def test_a_request_that_was_answered_in_time_gets_no_line(start: Start, tmp_path: Path, lines: io.StringIO) -> None:
    publish_vectors(tmp_path / "repository")
    live = start()
    live.client.post("/v1/classify", json=POINT, headers={"x-request-id": "fast"})
    assert of_request(lines, "fast") == []


def test_a_slow_request_says_who_asked_what_of_which_model(start: Start, tmp_path: Path, lines: io.StringIO) -> None:
    publish_vectors(tmp_path / "repository")
    live = start(auth="on", slow_seconds=0)
    key, made = KeyStore(live.store).create("test", [Scope.INFER], Limits())
    headers = {"x-request-id": "slow", "authorization": f"Bearer {key}"}
    while live.client.post("/v1/classify", json=POINT, headers=headers).status_code == 401:
        pass
    line = of_request(lines, "slow")[-1]
    assert line.pop("seconds") > 0
    assert line.pop("time")
    assert line.pop("message").startswith("POST /v1/classify 200")
    assert line == {
        "level": "info",
        "logger": "espalier.requests",
        "request_id": "slow",
        "key": made.id,
        "model": "points",
        "version": 1,
        "method": "POST",
        "path": "/v1/classify",
        "status": 200,
    }
    assert key not in lines.getvalue()


def test_a_failure_is_told_with_its_cause(
    start: Start, tmp_path: Path, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_vectors(tmp_path / "repository")
    live = start()
    monkeypatch.setattr(live.repository, "get", lambda *_: 1 / 0)
    message_of(live.client.post("/v1/classify", json=POINT, headers={"x-request-id": "broken"}), 500)
    cause, status = of_request(lines, "broken")
    assert "ZeroDivisionError" in cause["exception"]
    assert (status["level"], status["status"]) == ("error", 500)


def test_a_line_of_a_thread_that_works_for_a_request_is_that_requests(
    start: Start, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start()

    def listed(*_: Any, **__: Any) -> Any:
        logging.getLogger("espalier.test").warning("looking")
        return [], False

    monkeypatch.setattr(live.store, "list_files", listed)
    live.client.get("/v1/files", headers={"x-request-id": "in-thread"})
    assert [line["message"] for line in of_request(lines, "in-thread")] == ["looking"]


def test_a_line_that_belongs_to_no_request_names_none(start: Start, lines: io.StringIO) -> None:
    start()
    logging.getLogger("espalier.test").warning("alone")
    assert json.loads(lines.getvalue().splitlines()[-1]).keys() == {"time", "level", "logger", "message"}
