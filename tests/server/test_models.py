from __future__ import annotations

import time

from tests.models.narrow import SMALL
from tests.server.bundles import publish_texts, publish_vectors
from tests.server.conftest import Live, Start, message_of


def by_id(live: Live) -> dict[str, dict[str, object]]:
    answer = live.client.get("/v1/models").json()
    assert answer["object"] == "list"
    return {model["id"]: model for model in answer["data"]}


def test_backbones_and_architectures_can_be_fine_tuned(live: Live) -> None:
    models = by_id(live)
    assert {model["object"] for model in models.values()} == {"model"}
    assert {name: (models[name]["status"], models[name]["modality"]) for name in models} == {
        "efficientnet-lite0": ("trainable", "image"),
        "minilm-l6-v2": ("trainable", "text"),
        **dict.fromkeys(("efficientnet_lite0", *SMALL), ("trainable", "image")),
        "mlp": ("trainable", "vector"),
        "gan": ("trainable", "image"),
        **dict.fromkeys(("rnn", "lstm", "gru", "convnet1d"), ("trainable", "series, text")),
        **dict.fromkeys(("autoencoder", "vae"), ("trainable", "image, vector")),
        **dict.fromkeys(
            ("smollm2-135m-instruct", "seq2seq", "transformer", "transformer_encoder", "transformer_decoder"),
            ("trainable", "text"),
        ),
    }


def test_what_can_be_fine_tuned_says_what_it_can_learn(live: Live) -> None:
    models = by_id(live)
    mlp = models["mlp"]["objectives"]
    assert isinstance(mlp, list)
    assert mlp[0] == "cross_entropy"
    assert {"binary_cross_entropy", "multi_label", "squared_error", "gaussian", "multi_task"} <= set(mlp)
    assert "cross_entropy" in models["minilm-l6-v2"]["objectives"]  # type: ignore[operator]


def test_the_operators_backbones_are_listed(start: Start) -> None:
    models = by_id(start(backbones={"ours": "/models/ours"}))
    assert models["ours"]["status"] == "trainable"


def test_a_published_model_is_noticed_and_described(start: Start) -> None:
    live = start(poll_seconds=0.05)
    publish_vectors(live.settings.repository)
    while "points" not in by_id(live):
        time.sleep(0.05)
    model = by_id(live)["points"]
    assert (model["status"], model["task"], model["version"]) == ("served", "classification", 1)
    assert (model["modality"], model["classes"], model["metrics"]) == ("vector", 2, {"accuracy": 1.0})


def test_a_model_that_was_published_just_now_is_waited_for(start: Start) -> None:
    live = start(poll_seconds=0.3)
    asked = {"input": [0.5, 1.0]}

    def version_of(reference: str) -> int:
        answer = live.client.post("/v1/classify", json={"model": reference, **asked})
        assert answer.status_code == 200, answer.text
        version: int = answer.json()["version"]
        return version

    publish_vectors(live.settings.repository)
    assert version_of("points") == 1
    publish_vectors(live.settings.repository)
    assert version_of("points:2") == 2
    publish_vectors(live.settings.repository, "others")
    assert version_of("others:1") == 1
    # What is not there is not waited for, whatever it is called.
    for name in ("points:3", "point", "points@latest", "../points", ".", "points:", "points:02x", "p" * 5000, "\0"):
        message_of(live.client.post("/v1/classify", json={"model": name, **asked}), 404)


def test_one_that_is_not_served_in_time_is_not_there(start: Start) -> None:
    live = start(poll_seconds=1000.0)
    publish_vectors(live.settings.repository)
    asked = {"model": "points", "input": [0.5, 1.0]}
    refused = live.client.post("/v1/classify", json=asked, headers={"x-request-timeout": "0.1"})
    assert "no model 'points' is served" in message_of(refused, 404)


def test_a_version_that_is_damaged_is_not_waited_for_long(start: Start) -> None:
    live = start(poll_seconds=0.1)
    publish_vectors(live.settings.repository)
    manifest = publish_vectors(live.settings.repository)
    (live.settings.repository / "points" / str(manifest.version) / "model.onnx").write_bytes(b"no graph")
    refused = live.client.post("/v1/classify", json={"model": "points:2", "input": [0.5, 1.0]})
    assert "version '2' of points is not loaded (" in message_of(refused, 404)


def test_one_model_comes_with_its_manifest(start: Start) -> None:
    live = start()
    publish_texts(live.settings.repository)
    while (answer := live.client.get("/v1/models/days")).status_code == 404:
        time.sleep(0.05)
    model = answer.json()
    assert model["manifest"]["labels"] == ["good", "bad"]
    assert model["manifest"]["input"]["type"] == "text"
    assert live.client.get("/v1/models/days:1").json() == model
    assert "version 1 is served" in message_of(live.client.get("/v1/models/days:2"), 404)


def test_a_trainable_model_has_no_manifest(live: Live) -> None:
    model = live.client.get("/v1/models/mlp").json()
    assert (model["status"], model["manifest"]) == ("trainable", None)


def test_an_unknown_model(live: Live) -> None:
    assert "'gpt-17'" in message_of(live.client.get("/v1/models/gpt-17"), 404)


def test_a_fine_tuned_model_may_be_trained_further(start: Start) -> None:
    live = start()
    publish_vectors(live.settings.repository)
    file_id = live.file_id("points.csv", b"x,y,label\n1,2,a\n2,3,a\n3,-1,b\n4,-2,b\n")
    for model in ("points", "points:1"):
        job = live.client.post("/v1/fine_tuning/jobs", json={"model": model, "training_file": file_id}).json()
        assert (job["model"], job["status"]) == (model, "queued")
    answer = live.client.post("/v1/fine_tuning/jobs", json={"model": "points:9", "training_file": file_id})
    assert "it has 1" in message_of(answer, 404)
