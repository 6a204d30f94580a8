"""Keys, scopes, rates and quotas: through a server's socket, and with a clock that stands still where time counts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from litestar.routes import ASGIRoute, HTTPRoute

from finetune.jobs.store import JobStore
from server.access import Access
from server.cli import main
from server.errors import ApiError
from server.keys import KeyStore, Limits, Scope
from server.scopes import ADMIN, EXACT, scopes_for
from server.settings import Settings
from tests.server.bundles import publish_texts, publish_vectors
from tests.server.chains import publish_letters
from tests.server.conftest import Live, Start, message_of, running, until

POINT = {"model": "points", "input": [0.5, 1.0]}
CLASSIFY = "/v1/classify"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that asks for keys."""
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False, auth="on")
    publish_vectors(settings.repository)
    publish_texts(settings.repository)
    publish_letters(settings.repository)
    with running(settings) as server:
        yield server


def made(live: Live, *scopes: Scope, **limits: int) -> tuple[str, httpx.Client]:
    """A key's id, made where the server finds it by itself, and a client that sends it."""
    secret, key = KeyStore(live.store).create("test", scopes, Limits(**limits))
    client = httpx.Client(base_url=live.address, headers={"authorization": f"Bearer {secret}"}, timeout=60)
    until(lambda: httpx.get(f"{live.address}/v1/models", headers=client.headers).status_code != 401)
    return key.id, client


@pytest.fixture(scope="module")
def admin(live: Live) -> Iterator[httpx.Client]:
    with made(live, Scope.ADMIN)[1] as client:
        yield client


def new_key(admin: httpx.Client, *scopes: str, **limits: int) -> dict[str, Any]:
    answer = admin.post("/v1/keys", json={"name": "made", "scopes": scopes, "limits": limits})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def bearer(key: dict[str, Any]) -> dict[str, str]:
    return {"authorization": f"Bearer {key['key']}"}


def test_without_a_key_nothing_opens_but_what_says_that_the_server_lives(live: Live) -> None:
    answer = live.client.post(CLASSIFY, json=POINT)
    assert "Authorization: Bearer" in message_of(answer, 401)
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["x-request-id"]
    for path in ("/metrics", "/v1/models", "/v1/files", "/v1/keys", "/v1/fine_tuning/jobs", "/nowhere"):
        message_of(live.client.get(path), 401)
    for path in ("/health/live", "/health/ready", "/docs", "/openapi.json"):
        assert live.client.get(path).status_code == 200


@pytest.mark.parametrize(
    "sent", ["Bearer esp_00000000_x", "Bearer", "Basic YTpi", "esp", "Bearer \u00e9".encode("latin-1")]
)
def test_a_key_that_does_not_exist_opens_nothing(live: Live, sent: str | bytes) -> None:
    answer = live.client.post(CLASSIFY, json=POINT, headers={"authorization": sent})  # type: ignore[dict-item]
    message_of(answer, 401)
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_the_protocol_of_v2_has_its_errors_as_text(live: Live) -> None:
    answer = live.client.get("/v2/models/points")
    assert answer.status_code == 401
    assert "API key" in answer.json()["error"]


def test_a_key_opens_what_its_scopes_name(live: Live, admin: httpx.Client) -> None:
    reach = {
        "infer": (CLASSIFY, "/v1/models"),
        "train": ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models"),
        "metrics": ("/metrics",),
        "admin": (CLASSIFY, "/v1/models", "/v1/files", "/v1/fine_tuning/jobs", "/metrics", "/v1/keys"),
    }
    for scope, opened in reach.items():
        headers = bearer(new_key(admin, scope))
        for path in reach["admin"]:
            ask = live.client.post if path == CLASSIFY else live.client.get
            answer = ask(path, **({"json": POINT} if path == CLASSIFY else {}), headers=headers)
            if path in opened:
                assert answer.status_code == 200, answer.text
            else:
                assert f"has {scope}" in message_of(answer, 403)
                assert "insufficient_scope" in answer.headers["www-authenticate"]


def test_what_is_missing_is_named(live: Live, admin: httpx.Client) -> None:
    answer = live.client.get("/v1/files", headers=bearer(new_key(admin, "infer")))
    assert "the scope train" in message_of(answer, 403)
    assert answer.json()["error"]["code"] == "insufficient_scope"


def test_every_route_has_a_scope_of_its_own(live: Live) -> None:
    """What needs admin does so by decision: everything else under /v1 is named."""
    wanted = ("/v1/keys", "/deployment", "/aliases", "/load", "/unload")
    for route in live.server.application.routes:
        if isinstance(route, ASGIRoute | HTTPRoute):
            methods = {"POST"} if isinstance(route, ASGIRoute) else route.methods - {"OPTIONS"}
            for method in methods:
                needed = scopes_for(method, route.path_format)
                if needed == ADMIN:
                    assert any(word in route.path_format for word in wanted), route.path_format
    assert all(scopes_for("GET", path) == EXACT[path] for path in EXACT)
    for path in (
        "/v1/keys/",
        "//v1/keys",
        "/v1/models/a/deployment/",
        "/v2/repository/models/a/load",
        "/v1/filesystem",
    ):
        assert scopes_for("GET", path) == ADMIN


def test_openais_client_sends_what_is_needed(live: Live, admin: httpx.Client) -> None:
    key = new_key(admin, "infer")
    with openai.OpenAI(base_url=f"{live.address}/v1", api_key=key["key"], max_retries=0) as client:
        assert len(client.embeddings.create(model="points", input=[[0.0, 1.0]]).data) == 1  # type: ignore[arg-type]
    with openai.OpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"


def test_a_key_is_shown_once_and_kept_as_a_hash(live: Live, admin: httpx.Client) -> None:
    key = new_key(admin, "infer")
    assert key["key"].startswith(key["id"] + "_")
    assert len(key["key"]) >= len(key["id"]) + 1 + 43
    listed = admin.get("/v1/keys")
    assert key["id"] in [one["id"] for one in listed.json()["data"]]
    secret = key["key"].removeprefix(key["id"] + "_")
    assert secret not in listed.text
    database = b"".join(path.read_bytes() for path in live.settings.home.glob("espalier.db*"))
    assert key["id"].encode() in database
    assert secret.encode() not in database


def test_a_revoked_key_opens_nothing(live: Live, admin: httpx.Client) -> None:
    key = new_key(admin, "infer")
    assert live.client.post(CLASSIFY, json=POINT, headers=bearer(key)).status_code == 200
    revoked = admin.delete(f"/v1/keys/{key['id']}")
    assert revoked.json()["revoked_at"] is not None
    assert "revoked" in message_of(live.client.post(CLASSIFY, json=POINT, headers=bearer(key)), 401)
    for unknown in ("esp_00000000", "esp_none", "%00"):
        assert "no key" in message_of(admin.delete(f"/v1/keys/{unknown}"), 404)


def test_a_key_that_is_revoked_elsewhere_is_shut_out_soon(live: Live) -> None:
    key_id, client = made(live, Scope.INFER)
    with client:
        assert client.post(CLASSIFY, json=POINT).status_code == 200
        KeyStore(live.store).revoke(key_id)
        until(lambda: client.post(CLASSIFY, json=POINT).status_code == 401)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "x", "scopes": ["fly"]}, "scopes"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "", "scopes": ["infer"]}, "name"),
        ({"name": "a\0b", "scopes": ["infer"]}, "name"),
        ({"name": "x", "scopes": ["infer"], "limits": {"tokens_per_day": 10**20}}, "limits"),
        ({"name": "x", "scopes": ["infer"], "limits": {"requests_per_minute": 0}}, "limits"),
        ({"name": "x", "scopes": ["infer"], "limits": {"requests_per_hour": 1}}, "limits"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(admin: httpx.Client, body: dict[str, Any], param: str) -> None:
    before = len(admin.get("/v1/keys").json()["data"])
    assert param in message_of(admin.post("/v1/keys", json=body), 400)
    assert len(admin.get("/v1/keys").json()["data"]) == before


def test_a_rate_of_requests_is_told_and_kept(live: Live, admin: httpx.Client) -> None:
    key = new_key(admin, "infer", requests_per_minute=2)
    first, second, third = (live.client.post(CLASSIFY, json=POINT, headers=bearer(key)) for _ in range(3))
    assert first.status_code == second.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert "2 requests a minute" in message_of(third, 429)
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    assert third.json()["error"]["type"] == "requests"
    assert 1 <= int(third.headers["retry-after"]) <= 30
    assert third.headers["x-ratelimit-remaining-requests"] == "0"


def test_openais_client_raises_its_rate_limit_error(live: Live, admin: httpx.Client) -> None:
    key = new_key(admin, "infer", requests_per_minute=1)
    with openai.OpenAI(base_url=f"{live.address}/v1", api_key=key["key"], max_retries=0) as client:
        client.models.list()
        with pytest.raises(openai.RateLimitError):
            client.models.list()


def test_tokens_that_are_read_and_written_are_counted(live: Live, admin: httpx.Client) -> None:
    key = new_key(admin, "infer", tokens_per_day=1000)
    text = live.client.post(CLASSIFY, json={"model": "days", "input": "good good day"}, headers=bearer(key)).json()
    asked = {"model": "letters", "prompt": "ab", "max_tokens": 3}
    whole = live.client.post("/v1/completions", json=asked, headers=bearer(key)).json()
    with live.client.stream("POST", "/v1/completions", json={**asked, "stream": True}, headers=bearer(key)) as streamed:
        assert b"[DONE]" in streamed.read()
    expected = text["usage"]["total_tokens"] + 2 * whole["usage"]["total_tokens"]
    assert whole["usage"]["total_tokens"] > 3

    def used() -> dict[str, int]:
        found: dict[str, int] = next(one for one in admin.get("/v1/keys").json()["data"] if one["id"] == key["id"])[
            "used"
        ]
        return found

    until(lambda: used()["day_tokens"] >= expected)
    assert (used()["day_tokens"], used()["day_requests"], used()["month_requests"]) == (expected, 3, 3)


def test_a_quota_that_is_used_up_refuses(live: Live, admin: httpx.Client) -> None:
    key = new_key(admin, "infer", requests_per_month=1)
    assert live.client.post(CLASSIFY, json=POINT, headers=bearer(key)).status_code == 200
    answer = live.client.post(CLASSIFY, json=POINT, headers=bearer(key))
    assert "1 requests of this month" in message_of(answer, 429)
    assert answer.json()["error"]["code"] == "insufficient_quota"
    assert int(answer.headers["retry-after"]) >= 1


def test_metrics_tell_what_became_of_requests_by_key(live: Live, admin: httpx.Client) -> None:
    key = new_key(admin, "infer")
    live.client.post(CLASSIFY, json=POINT, headers=bearer(key))
    live.client.get("/v1/files", headers=bearer(key))
    lines = admin.get("/metrics").text.splitlines()
    for outcome in ("admitted", "forbidden"):
        assert f'espalier_key_requests_total{{key="{key["id"]}",outcome="{outcome}"}} 1.0' in lines


def test_metrics_may_be_open(start: Start) -> None:
    live = start(auth="on", open_metrics=True)
    assert live.client.get("/metrics").status_code == 200
    message_of(live.client.get("/v1/models"), 401)


def test_usage_outlives_the_server(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, port=0, worker=False, auth="on")
    publish_vectors(settings.repository)
    with running(settings) as first:
        _, client = made(first, Scope.INFER, requests_per_day=6)
        with client:
            for _ in range(2):
                client.post(CLASSIFY, json=POINT)
    with running(settings) as second:
        statuses = [second.client.post(CLASSIFY, json=POINT, headers=client.headers).status_code for _ in range(6)]
    admitted = statuses.count(200)
    assert statuses == [200] * admitted + [429] * (6 - admitted)
    assert admitted <= 4


@pytest.mark.parametrize(
    ("host", "auth", "on"),
    [
        ("127.0.0.1", "auto", False),
        ("localhost", "auto", False),
        ("::1", "auto", False),
        ("0.0.0.0", "auto", True),
        ("", "auto", True),
        ("models.example.org", "auto", True),
        ("0.0.0.0", "off", False),
        ("127.0.0.1", "on", True),
    ],
)
def test_keys_are_needed_where_others_can_reach_the_server(host: str, auth: Any, on: bool) -> None:
    assert Access(Settings(host=host, auth=auth)).on is on


def test_a_start_without_keys_says_how_to_make_one(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    live = start(host="0.0.0.0")
    assert "espalier keys create --scopes infer,train --name ci" in caplog.text
    port = live.address.rpartition(":")[2]
    message_of(httpx.get(f"http://127.0.0.1:{port}/v1/models"), 401)


# With a clock of the test's own


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0  # 2027-01-15 08:00 UTC

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyStore]:
    store = JobStore(f"sqlite:///{tmp_path}/espalier.db")
    yield KeyStore(store)
    store.close()


class Door:
    """One process that lets one key in."""

    def __init__(self, keys: KeyStore, clock: Clock, secret: str, shared: Path | None = None) -> None:
        self.access = Access(Settings(auth="on"), shared, clock, clock)
        self.access.keys = keys
        self.secret = secret
        asyncio.run(self.access.refresh())

    def admitted(self, tokens: int = 0) -> bool:
        header = (b"authorization", f"Bearer {self.secret}".encode())
        try:
            caller = self.access.admit([header], "POST", CLASSIFY, None)
        except ApiError as error:
            self.retry_after = int(error.headers["retry-after"])
            return False
        assert caller is not None
        caller.spend(tokens)
        self.headers = {name.decode(): value.decode() for name, value in caller.headers()}
        return True

    def flush(self) -> None:
        asyncio.run(self.access.flush())


def door(keys: KeyStore, clock: Clock, shared: Path | None = None, **limits: int) -> Door:
    return Door(keys, clock, keys.create("test", [Scope.INFER], Limits(**limits))[0], shared)


def test_a_bucket_holds_a_minute_and_fills_evenly(keys: KeyStore, clock: Clock) -> None:
    one = door(keys, clock, requests_per_minute=60)
    assert [one.admitted() for _ in range(61)] == [True] * 60 + [False]
    assert one.retry_after == 1
    assert one.headers["x-ratelimit-remaining-requests"] == "0"
    assert one.headers["x-ratelimit-reset-requests"] == "1m0s"
    clock.now += 2.5
    assert [one.admitted() for _ in range(3)] == [True, True, False]
    clock.now += 3600
    assert [one.admitted() for _ in range(61)] == [True] * 60 + [False]


def test_tokens_are_taken_after_the_answer_and_a_debt_is_waited_for(keys: KeyStore, clock: Clock) -> None:
    one = door(keys, clock, tokens_per_minute=600)
    assert one.admitted(tokens=500)
    assert one.headers["x-ratelimit-remaining-tokens"] == "100"
    assert one.headers["x-ratelimit-reset-tokens"] == "50s"
    assert one.admitted(tokens=400)
    assert one.headers["x-ratelimit-remaining-tokens"] == "0"
    assert not one.admitted()
    clock.now += one.retry_after
    assert one.admitted()
    assert one.retry_after == 31  # 300 in debt at 10 a second, and one to begin with


def test_quotas_begin_anew_with_their_day_and_month(keys: KeyStore, clock: Clock) -> None:
    one = door(keys, clock, requests_per_day=2, requests_per_month=3)
    assert [one.admitted() for _ in range(3)] == [True, True, False]
    assert one.retry_after == 16 * 3600
    clock.now += one.retry_after
    assert [one.admitted() for _ in range(2)] == [True, False]  # the month's are used up
    assert one.retry_after == 16 * 86400
    clock.now += one.retry_after
    assert [one.admitted() for _ in range(3)] == [True, True, False]


def test_a_quota_of_tokens_counts_what_was_answered(keys: KeyStore, clock: Clock) -> None:
    one = door(keys, clock, tokens_per_day=100)
    assert [one.admitted(tokens=60) for _ in range(3)] == [True, True, False]
    one.flush()
    assert not one.admitted()
    clock.now += 86400
    assert one.admitted()


def test_processes_of_one_server_share_their_rates(keys: KeyStore, clock: Clock, tmp_path: Path) -> None:
    shared = tmp_path / "rates"
    first = door(keys, clock, shared, requests_per_minute=4, tokens_per_minute=100)
    second = Door(keys, clock, first.secret, shared)
    assert [one.admitted() for one in (first, second, first, second, first, second)] == [True] * 4 + [False] * 2
    clock.now += 60
    assert first.admitted(tokens=150)
    assert not second.admitted()


def test_servers_of_one_database_share_their_quotas_with_every_flush(keys: KeyStore, clock: Clock) -> None:
    first = door(keys, clock, requests_per_day=4)
    second = Door(keys, clock, first.secret)
    assert [first.admitted(), first.admitted(), second.admitted()] == [True] * 3
    first.flush()
    second.flush()
    assert [second.admitted(), second.admitted()] == [True, False]
    second.flush()
    first.admitted()
    first.flush()
    assert not first.admitted()


def test_the_command_line_makes_lists_and_revokes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    home = ["--home", str(tmp_path)]
    limits = ["--requests-per-minute", "60", "--tokens-per-month", "1000000"]
    assert main(["keys", "create", "--name", "ci", "--scopes", "infer, train", *limits, *home]) == 0
    secret = capsys.readouterr().out.strip()
    key_id = secret[:12]
    assert main(["keys", "list", *home]) == 0
    listed = capsys.readouterr().out
    for word in (key_id, "ci", "infer, train", "60 requests per minute, 1000000 tokens per month", "valid"):
        assert word in listed
    assert secret not in listed
    assert main(["keys", "revoke", key_id, *home]) == 0
    assert main(["keys", "list", *home]) == 0
    assert "revoked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "--name", "x", "--scopes", "fly"], "'fly'"),
        (["create", "--name", "x", "--scopes", "infer", "--tokens-per-day", "0"], "tokens_per_day"),
        (["revoke", "esp_00000000"], "no key 'esp_00000000'"),
    ],
)
def test_a_wrong_command_ends_with_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["keys", *arguments, "--home", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
