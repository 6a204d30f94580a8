"""Ensembles over a real socket: their uncertainty is served, and what cannot be joined is refused at submission."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from export.bundle import Head
from server.settings import Settings
from tests.server.bundles import publish_head, publish_heads, publish_images, publish_sums, publish_vectors
from tests.server.conftest import VECTORS, Live, message_of, running

JOBS = "/v1/fine_tuning/jobs"
# The first of two numbers decides, the second is the uncertainty.
DECIDES, DOUBTS, SIZES = [[-1.0, 1.0], [0.0, 0.0]], [0.0, 1.0], [[0.0], [1.0]]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False)
    home = settings.repository
    for publish in (publish_vectors, publish_images, publish_sums, publish_heads):
        publish(home)
    publish_vectors(home, "more")
    publish_vectors(home, "wide", features=3)
    publish_head(home, "one", "classification", {"logits": DECIDES, "uncertainty": DOUBTS}, labels=["no", "yes"])
    publish_head(home, "sets", "multi_label", {"logits": DECIDES, "uncertainty": DOUBTS}, labels=["no", "yes"])
    numbers = {"value": [[1.0], [0.0]], "uncertainty": SIZES}
    publish_head(home, "size", "regression", numbers, labels=["size"])
    both = {"logits_kind": DECIDES, "uncertainty_kind": DOUBTS, "value_size": SIZES, "uncertainty_size": SIZES}
    heads = {
        "kind": Head(task="classification", labels=["no", "yes"]),
        "size": Head(task="regression", labels=["size"]),
    }
    publish_head(home, "both", "multi_task", both, heads=heads)
    with running(settings) as server:
        yield server


def answer(live: Live, route: str, model: str) -> dict[str, Any]:
    response = live.client.post(f"/v1/{route}", json={"model": model, "input": [[2.0, 0.25], [-2.0, 0.5]]})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["data"][1]
    return found


def test_what_the_members_do_not_agree_about_is_in_the_answer(live: Live) -> None:
    one = answer(live, "classify", "one")
    assert (one["label"], one["uncertainty"]) == ("no", 0.5)
    assert answer(live, "classify", "sets")["uncertainty"] == 0.5
    assert answer(live, "predict", "size") == {"index": 1, "values": {"size": -2.0}, "uncertainty": {"size": 0.5}}
    heads = answer(live, "predict", "both")["heads"]
    assert (heads["kind"]["label"], heads["kind"]["uncertainty"]) == ("no", 0.5)
    assert heads["size"] == {"values": {"size": 0.5}, "uncertainty": {"size": 0.5}}
    assert "uncertainty" not in answer(live, "classify", "points"), "one network has nothing to be apart from"


@pytest.mark.parametrize(
    ("recipe", "status", "words"),
    [
        ({"model": "points", "ensemble": {"type": "published", "models": ["nobody"]}}, 404, "no model 'nobody'"),
        ({"model": "points", "ensemble": {"type": "published", "models": ["more:7"]}}, 404, "more has no version '7'"),
        (
            {"model": "points", "ensemble": {"type": "published", "models": ["points:1"]}},
            400,
            "points:1 is named twice",
        ),
        (
            {"model": "points", "ensemble": {"type": "published", "models": ["wide"]}},
            *(400, "wide:1 cannot be joined with points:1: its input has features 3, not 2"),
        ),
        (
            {"model": "points", "ensemble": {"type": "published", "models": ["shades"]}},
            *(400, "shades:1 cannot be joined with points:1: it answers light, dark, not above, below"),
        ),
        (
            {"model": "points", "ensemble": {"type": "published", "models": ["sums"]}},
            *(400, "sums:1 cannot be joined with points:1: it answers regression, not classification"),
        ),
        ({"model": "mlp", "ensemble": {"type": "published", "models": ["more"]}}, 404, "no model 'mlp' is published"),
        ({"model": "mlp", "ensemble": {"type": "dropout"}}, 400, "mlp has no dropout"),
        (
            {"model": "mlp", "ensemble": {"type": "bagging", "vote": "majority"}, "objective": {"type": "gaussian"}},
            *(400, "numbers have no majority"),
        ),
        ({"model": "mlp", "ensemble": {"type": "bagging", "members": 1}}, 400, ">= 2"),
        ({"model": "ensemble"}, 400, "ensemble is made of other networks"),
        ({"model": {"architecture": "mc_dropout"}}, 400, "mc_dropout"),
    ],
)
def test_what_cannot_answer_as_one_is_refused_when_it_is_submitted(
    live: Live, recipe: dict[str, Any], status: int, words: str
) -> None:
    file = live.file_id("points.csv", VECTORS)
    assert words in message_of(live.client.post(JOBS, json={"training_file": file, **recipe}), status)


def test_what_can_is_taken(live: Live) -> None:
    file = live.file_id("points.csv", VECTORS)
    for recipe in (
        {"model": "mlp", "ensemble": {"type": "bagging"}},
        {"model": "points", "ensemble": {"type": "published", "models": ["more"], "vote": "majority"}},
        {"model": {"architecture": "mlp", "hyperparameters": {"dropout": 0.5}}, "ensemble": {"type": "dropout"}},
    ):
        response = live.client.post(JOBS, json={"training_file": file, **recipe})
        assert response.status_code == 200, response.text
        assert response.json()["recipe"]["ensemble"]["type"] == recipe["ensemble"]["type"]  # type: ignore[index]
