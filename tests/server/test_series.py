"""Series over a real socket, in every form that they may have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from server.settings import Settings
from tests.server.bundles import publish_series
from tests.server.conftest import Live, message_of, running


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False)
    publish_series(settings.repository)
    publish_series(settings.repository, "temperatures", channels=1)
    with running(settings) as server:
        yield server


def ask(live: Live, model: str, given: Any) -> httpx.Response:
    return live.client.post("/v1/classify", json={"model": model, "input": given})


def labels(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [answer["label"] for answer in response.json()["data"]]


def test_one_series_and_many_of_different_length_in_json(live: Live) -> None:
    assert labels(ask(live, "trends", [[0, 3], [0, -1]])) == ["above"]
    assert labels(ask(live, "trends", [[[0, 3]], [[0, 3], [5, -4], [5, 0]]])) == ["above", "below"]
    assert labels(ask(live, "temperatures", [3, -4.5])) == ["below"]
    assert labels(ask(live, "temperatures", [[3, -4.5], [1]])) == ["below", "above"]
    assert labels(ask(live, "temperatures", [[[3], [-4.5]], [[1]]])) == ["below", "above"]


def test_the_embedding_of_a_series_does_not_depend_on_its_company(live: Live) -> None:
    series = [[[0.0, 3.0]], [[0.0, -3.0], [5.0, -4.0], [5.0, 0.0]]]
    together, alone = (
        [one["embedding"] for one in response.json()["data"]]
        for response in (
            live.client.post("/v1/embeddings", json={"model": "trends", "input": given})
            for given in (series, series[1])
        )
    )
    assert together[1] == alone[0]
    assert together[0] != together[1]


def test_raw_bodies_and_forms(live: Live) -> None:
    below, above = (np.array([[9, 1], [9, last]], "<f4").tobytes() for last in (-3, 3))
    headers = {"content-type": "application/octet-stream"}
    response = live.client.post("/v1/classify?model=trends", content=below, headers=headers)
    assert labels(response) == ["below"]
    files = [("file", ("a.bin", above)), ("file", ("b.bin", below + above[:8]))]
    assert labels(live.client.post("/v1/classify", data={"model": "trends"}, files=files)) == ["above", "below"]


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("trends", [1, 2], "steps of 2 numbers"),
        ("trends", [[1, 2], [3]], "step 1 of the series has 1 numbers"),
        ("trends", [[[1, 2]], [[1, 2], [3]]], "input 1: step 1 of the series has 1 numbers"),
        ("trends", [[[[1, 2]]]], "steps of 2 numbers"),
        ("trends", [[1, 2]] * 17, "17 steps; this model reads at most 16"),
        ("trends", "up", "expected a list of steps"),
        ("trends", [], "empty"),
        ("temperatures", [1, None], "expected a list of steps"),
        ("temperatures", [[], [1]], "input 0: the series is empty"),
        ("temperatures", 3.5, "expected a list of steps"),
    ],
)
def test_what_is_no_series_says_so(live: Live, model: str, given: Any, words: str) -> None:
    assert words in message_of(ask(live, model, given), 400)


def test_another_kind_of_body_is_refused(live: Live) -> None:
    response = live.client.post("/v1/classify?model=trends", content=b"1", headers={"content-type": "image/png"})
    assert "application/octet-stream" in message_of(response, 415)
    headers = {"content-type": "application/octet-stream"}
    response = live.client.post("/v1/classify?model=trends", content=b"12345", headers=headers)
    assert "8 bytes a step" in message_of(response, 400)
