"""Keys, their limits and traces hold for a server as a whole, whichever of its processes a connection reaches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from server.keys import KeyStore, Limits, Scope, today
from server.settings import Settings
from tests.server.bundles import publish_vectors
from tests.server.chains import publish_letters
from tests.server.conftest import Live, running, until
from tests.server.test_traces import Collector

pytestmark = pytest.mark.slow

POINT = {"model": "points", "input": [0.5, 1.0]}
WRITTEN = {"model": "letters", "prompt": "ab", "max_tokens": 3}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Live]:
    settings = Settings(
        home=tmp_path_factory.mktemp("home"),
        port=0,
        worker=False,
        frontends=2,
        auth="on",
        otlp_endpoint=collector.address,
        trace_share=0.0,
    )
    publish_vectors(settings.repository)
    publish_letters(settings.repository)
    with running(settings) as found:
        yield found


def asked(live: Live, key: str, path: str = "/v1/classify", body: object = POINT) -> httpx.Response:
    """By a connection of its own: the kernel chooses the process."""
    return httpx.post(live.address + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)


def key(live: Live, limits: Limits, *scopes: Scope) -> tuple[str, str]:
    """A key that all processes know, with its id."""
    made, its = KeyStore(live.store).create("test", scopes or [Scope.INFER], limits)
    known = 0
    end = time.monotonic() + 20
    while known < 20:  # in a row: a process that does not know it yet would have been met
        assert time.monotonic() < end
        # A request that is refused for want of a model has been let in all the same, and costs no token.
        known = 0 if asked(live, made, body={"model": "none", "input": [1]}).status_code == 401 else known + 1
    return made, its.id


def test_without_a_key_no_process_answers(live: Live) -> None:
    for path, body in (("/v1/classify", POINT), ("/v1/completions", WRITTEN), ("/v1/files", None)):
        statuses = {httpx.post(live.address + path, json=body).status_code for _ in range(12)}
        assert statuses == {401}, path


def test_a_rate_is_that_of_all_processes_together(live: Live) -> None:
    """Short and long way, front-end and inference process: one bucket."""
    made, _ = key(live, Limits(requests_per_minute=1000, tokens_per_minute=5))
    counted = Counter(asked(live, made, "/v1/completions", WRITTEN).status_code for _ in range(10))
    assert counted[200] < 3  # five tokens each
    assert counted[429] == 10 - counted[200]
    assert {asked(live, made).status_code for _ in range(10)} == {429}


def test_what_is_left_is_told_by_whoever_answers(live: Live) -> None:
    made, _ = key(live, Limits(requests_per_minute=60))
    answers = [
        asked(live, made, *way) for _ in range(6) for way in (("/v1/classify", POINT), ("/v1/completions", WRITTEN))
    ]
    assert {answer.status_code for answer in answers} == {200}
    left = [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers]
    assert max(left) < 60
    assert all(answer.headers["x-ratelimit-limit-requests"] == "60" for answer in answers)


def test_what_processes_let_in_is_one_sum(live: Live) -> None:
    made, its = key(live, Limits())
    before = used(live, its)
    for _ in range(8):
        assert asked(live, made).status_code == 200
        assert asked(live, made, "/v1/completions", WRITTEN).status_code == 200
    until(lambda: used(live, its)[0] - before[0] >= 16 and used(live, its)[1] - before[1] >= 8 * 5)

    def told() -> float:
        text = asked_metrics(live)
        lines = [line for line in text.splitlines() if f'key="{its}"' in line and 'outcome="admitted"' in line]
        return float(lines[0].rpartition(" ")[2]) if lines else 0

    until(lambda: told() == used(live, its)[0])


def used(live: Live, its: str) -> tuple[int, int]:
    keys = KeyStore(live.store)
    [number] = [one.number for one in keys.all() if one.id == its]
    found = keys.usage(today(time.time()), [number]).get(number)
    return (found.day_requests, found.day_tokens) if found else (0, 0)


METRICS: dict[int, str] = {}


def asked_metrics(live: Live) -> str:
    if id(live) not in METRICS:
        METRICS[id(live)] = KeyStore(live.store).create("prometheus", [Scope.METRICS], Limits())[0]
    return httpx.get(f"{live.address}/metrics", headers={"authorization": f"Bearer {METRICS[id(live)]}"}).text


def test_a_revoked_key_is_soon_unknown_to_all_processes(live: Live) -> None:
    made, its = key(live, Limits())
    KeyStore(live.store).revoke(its)
    time.sleep(1.0)  # is what is promised
    statuses = Counter(
        asked(live, made, *way).status_code for _ in range(10) for way in ((), ("/v1/completions", WRITTEN))
    )
    assert statuses == {401: 20}


def test_traces_come_from_every_process(live: Live, collector: Collector) -> None:
    made, _ = key(live, Limits())
    traces = [f"{number:032x}" for number in range(1, 13)]
    for number, trace in enumerate(traces):
        path, body = ("/v1/completions", WRITTEN) if number % 2 else ("/v1/classify", POINT)
        headers = {"authorization": f"Bearer {made}", "traceparent": f"00-{trace}-{1:016x}-01"}
        assert httpx.post(live.address + path, json=body, headers=headers).status_code == 200
    until(lambda: {one.trace_id.hex() for one in collector.spans} >= set(traces))
    for number, trace in enumerate(traces):
        names = Counter(one.name for one in collector.spans if one.trace_id.hex() == trace)
        if number % 2:
            assert names.items() >= {"POST /v1/completions": 1, "prefill": 1}.items()
        else:
            assert names == dict.fromkeys(("POST /v1/classify", "decode", "queue", "batch", "session", "encode"), 1)
