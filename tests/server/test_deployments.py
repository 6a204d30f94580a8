"""How a model is served, changed over HTTP while it is."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from export.storage import Storage
from server.runtime.deployment import Deployment, write
from tests.server.bundles import publish_constant
from tests.server.conftest import Live, Start, message_of


def publish(live: Live, name: str, versions: int, before: int = 0) -> None:
    """Versions that answer their own number."""
    for version in range(before + 1, before + versions + 1):
        publish_constant(live.settings.repository, name, version)


def number(live: Live, reference: str, **headers: str) -> tuple[int, int]:
    """The version that says it answered, and the one that did."""
    response = live.client.post("/v1/predict", json={"model": reference, "input": [1.0, 2.0]}, headers=headers)
    assert response.status_code == 200, response.text
    body = response.json()
    return body["version"], round(body["data"][0]["values"]["number"])


def answered(live: Live, reference: str, **headers: str) -> int:
    said, did = number(live, reference, **headers)
    assert said == did
    return said


@pytest.fixture(scope="module")
def digits(live: Live) -> Live:
    """A server with four versions of "digits", of which it serves the newest."""
    publish(live, "digits", 4)
    while (response := live.client.get("/v1/models/digits")).status_code != 200 or response.json()["version"] != 4:
        time.sleep(0.02)
    return live


@pytest.fixture(autouse=True)
def by_default(digits: Live) -> None:
    assert digits.client.put("/v1/models/digits/deployment", json={}).status_code == 200


def test_without_a_file_everything_is_by_default(digits: Live) -> None:
    body = digits.client.get("/v1/models/digits/deployment").json()
    assert body["versions"] == {"policy": "latest", "n": 1}
    assert body["aliases"] == body["traffic"] == {}
    assert answered(digits, "digits") == answered(digits, "digits:4") == 4


def test_an_alias_is_loaded_moved_and_removed(digits: Live) -> None:
    path = "/v1/models/digits/aliases/production"
    body = digits.client.put(path, json={"version": 2}).json()
    assert body == {"model": "digits", "alias": "production", "version": 2, "was": None, "object": "model.alias"}
    assert answered(digits, "digits@production") == answered(digits, "digits:2") == 2
    assert answered(digits, "digits") == 4
    assert digits.client.put(path, json={"version": 3, "expected": 2}).json()["was"] == 2
    assert answered(digits, "digits@production") == 3
    message = message_of(digits.client.put(path, json={"version": 1, "expected": 2}), 409)
    assert message == "digits@production means 3, not 2"
    assert answered(digits, "digits@production") == 3
    assert digits.client.get("/v1/models/digits@production").json()["version"] == 3
    assert b'alias_info{alias="production",model="digits",version="3"} 1.0' in digits.client.get("/metrics").content
    assert digits.client.delete(path).json()["was"] == 3
    response = digits.client.post("/v1/predict", json={"model": "digits@production", "input": [1.0, 2.0]})
    assert "no alias 'production'" in message_of(response, 404)
    message_of(digits.client.delete(path), 404)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("digits/aliases/production", {"version": 9}, 404, "there is no version 9 of digits; there are: 1, 2, 3, 4"),
        ("nothing/aliases/production", {"version": 1}, 404, "no model 'nothing'"),
        ("digits/aliases/1st", {"version": 1}, 400, "letters, digits"),
        ("digits/aliases/production", {"version": 0}, 400, "version"),
        ("digits/aliases/production", {"versions": 1}, 400, "versions"),
        ("digits/deployment", {"shadow": {"version": 9}}, 400, "shadow: there is no version 9"),
        ("digits/deployment", {"traffic": {"newest": 1.0}}, 400, "traffic: 'newest' is no version"),
        ("digits/deployment", {"versions": {"policy": "best"}}, 400, "versions.policy"),
        ("nothing/deployment", {}, 404, "no model 'nothing'"),
    ],
)
def test_what_cannot_be_is_refused(digits: Live, path: str, body: dict[str, Any], status: int, words: str) -> None:
    before = digits.client.get("/v1/models/digits/deployment").json()
    assert words in message_of(digits.client.put(f"/v1/models/{path}", json=body), status)
    assert digits.client.get("/v1/models/digits/deployment").json() == before


def test_of_two_that_change_it_at_once_one_is_told(digits: Live) -> None:
    tag = digits.client.get("/v1/models/digits/deployment").headers["etag"]
    first = digits.client.patch("/v1/models/digits/deployment", json={"traffic": {"3": 1}}, headers={"If-Match": tag})
    assert first.status_code == 200
    second = digits.client.put("/v1/models/digits/deployment", json={}, headers={"If-Match": tag})
    assert "its ETag is " + first.headers["etag"] in message_of(second, 412)
    assert answered(digits, "digits") == 3


def test_a_patch_changes_entries_of_maps_and_replaces_the_rest(digits: Live) -> None:
    path = "/v1/models/digits/deployment"
    digits.client.patch(path, json={"aliases": {"a": 1, "b": 2}, "versions": {"policy": "named", "versions": [3]}})
    body = digits.client.patch(path, json={"aliases": {"a": None, "c": 3}, "versions": {"policy": "all"}}).json()
    assert body["aliases"] == {"b": 2, "c": 3}
    assert body["versions"] == {"policy": "all"}
    assert digits.client.patch(path, json={"versions": None}).json()["versions"] == {"policy": "latest", "n": 1}


def test_policies_choose_the_versions(digits: Live) -> None:
    def served(versions: dict[str, Any]) -> list[int]:
        assert digits.client.put("/v1/models/digits/deployment", json={"versions": versions}).status_code == 200
        described = digits.client.get("/v1/models/digits").json()["versions"]
        return [one["version"] for one in described if one["state"] == "ready"]

    assert served({"policy": "latest", "n": 3}) == [2, 3, 4]
    assert served({"policy": "all"}) == [1, 2, 3, 4]
    assert answered(digits, "digits:1") == 1
    assert served({"policy": "named", "versions": [2, 1]}) == [1, 2]
    assert answered(digits, "digits") == 2


def test_traffic_is_split_by_its_shares_and_a_session_stays(digits: Live) -> None:
    digits.client.put("/v1/models/digits/deployment", json={"traffic": {"1": 30, "4": 10}})
    counts = Counter(answered(digits, "digits") for _ in range(400))
    assert counts.keys() == {1, 4}
    assert 240 < counts[1] < 350
    sessions = Counter(answered(digits, "digits", **{"X-Session-ID": f"user-{one}"}) for one in range(200))
    assert 110 < sessions[1] < 180
    assert len({answered(digits, "digits", **{"X-Session-ID": "me"}) for _ in range(20)}) == 1
    described = digits.client.get("/v1/models/digits").json()
    assert described["traffic"] == pytest.approx({"1": 0.75, "4": 0.25})


def test_no_request_fails_while_aliases_move(digits: Live) -> None:
    path = "/v1/models/digits/aliases/production"
    digits.client.put(path, json={"version": 1})
    going = threading.Event()

    def ask() -> set[int]:
        seen = set()
        while not going.is_set():
            seen.add(answered(digits, "digits@production"))
        return seen

    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(ask) for _ in range(3)]
        for version in (2, 3, 1, 4):
            assert digits.client.put(path, json={"version": version}).status_code == 200
            assert answered(digits, "digits@production") == version
        going.set()
        assert all(one.result() for one in asking)


def test_a_shadow_is_asked_what_is_asked_and_compared(digits: Live) -> None:
    digits.client.put(
        "/v1/models/digits/deployment", json={"traffic": {"4": 1}, "shadow": {"version": 3, "share": 1.0}}
    )
    for _ in range(5):
        assert answered(digits, "digits") == 4
    line = 'espalier_shadow_requests_total{model="digits",outcome="different",version="3"} 5.0'
    for _ in range(100):
        if line in digits.client.get("/metrics").text:
            break
        time.sleep(0.02)
    assert line in digits.client.get("/metrics").text


def test_what_is_changed_is_followed_after_a_restart_and_in_the_file(start: Start) -> None:
    first = start()
    publish(first, "digits", 2)
    while first.client.get("/v1/models/digits").status_code != 200:
        time.sleep(0.02)
    first.client.put("/v1/models/digits/aliases/stable", json={"version": 1})
    file = first.settings.repository / "digits" / "deployment.json"
    second = start()
    assert answered(second, "digits@stable") == 1
    file.write_text('{"aliases": {"stable": 2}}')
    for _ in range(300):
        if answered(second, "digits@stable") == 2:
            break
        time.sleep(0.02)
    assert answered(second, "digits@stable") == 2
    file.write_text('{"aliases": {"stable": "two"}}')
    message = message_of(second.client.put("/v1/models/digits/aliases/stable", json={"version": 1}), 409)
    assert f"{file}: Expected `int`" in message
    assert answered(second, "digits@stable") == 2


def test_a_version_that_does_not_load_changes_nothing(digits: Live) -> None:
    folder = digits.settings.repository / "digits"
    shutil.copytree(folder / "1", folder / "9")
    (folder / "9" / "model.onnx").write_bytes(b"no graph")
    try:
        digits.client.put("/v1/models/digits/aliases/production", json={"version": 2})
        message = message_of(digits.client.put("/v1/models/digits/aliases/production", json={"version": 9}), 409)
        assert "digits:9 does not load" in message
        assert answered(digits, "digits@production") == 2
        assert answered(digits, "digits") == 4
        last = digits.client.get("/v1/models/digits").json()["versions"][-1]
        assert (last["version"], last["state"]) == (9, "unavailable")
        assert "sha256" in last["reason"]
    finally:
        shutil.rmtree(folder / "9")


def test_a_repository_on_object_storage(start: Start, tmp_path_factory: pytest.TempPathFactory) -> None:
    url = f"memory://{uuid4().hex}/models"
    first, second = start(repository_url=url), start(repository_url=url, home=tmp_path_factory.mktemp("second"))
    publish(first, "digits", 2)  # into the folder of the first, which mirrors the store
    for one in (first, second):
        while one.client.get("/v1/models/digits").status_code != 200 or answered(one, "digits") != 2:
            time.sleep(0.02)
    assert first.client.put("/v1/models/digits/aliases/stable", json={"version": 1}).status_code == 200
    assert answered(first, "digits@stable") == 1
    while second.client.get("/v1/models/digits@stable").status_code != 200:
        time.sleep(0.02)
    assert answered(second, "digits@stable") == 1
    Storage(url).files.rm(Storage(url).root, recursive=True)
    while second.client.get("/v1/models/digits").status_code == 200:
        time.sleep(0.02)
    assert not (second.settings.repository / "digits" / "2").exists()


def test_a_lazy_model_that_has_no_room_says_when_to_come_back(start: Start, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish_constant(repository, "always", 1.0, ballast=100_000)
    publish_constant(repository, "lazy", 1.0, ballast=100_000)
    write(repository / "lazy", Deployment(lazy=True))
    live = start(model_memory_bytes=150_000)
    listed = {one["id"]: one["status"] for one in live.client.get("/v1/models").json()["data"]}
    assert (listed["always"], listed["lazy"]) == ("served", "published")
    assert live.client.get("/v1/models/lazy").json()["manifest"]["name"] == "lazy"
    response = live.client.post("/v1/predict", json={"model": "lazy", "input": [1.0, 2.0]})
    assert "taken by models that are not evicted" in message_of(response, 503)
    assert int(response.headers["retry-after"]) > 0
    assert answered(live, "always") == 1
    assert live.client.patch("/v1/models/always/deployment", json={"lazy": True}).status_code == 200
    assert answered(live, "lazy") == 1
    assert live.client.get("/health/ready").json()["models"] == 2


def test_an_alias_holds_in_every_front_end_once_its_move_is_answered(start: Start, tmp_path: Path) -> None:
    for version in (1, 2):
        publish_constant(tmp_path / "repository", "digits", version)
    live = start(frontends=2)
    for move in range(12):
        version = 1 + move % 2
        assert live.client.put("/v1/models/digits/aliases/production", json={"version": version}).status_code == 200
        for _ in range(4):  # connections of their own, which either front-end takes
            with httpx.Client(base_url=live.address) as client:
                response = client.post("/v1/predict", json={"model": "digits@production", "input": [1.0, 2.0]})
            assert response.json()["version"] == version
