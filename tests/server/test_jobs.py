from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.jobs.states import State
from finetune.jobs.store import Published
from tests.server.conftest import SENTIMENTS, VECTORS, Live, Start, message_of

JOBS = "/v1/fine_tuning/jobs"
WORKER = "the worker of this test"


def submit(live: Live, **recipe: Any) -> dict[str, Any]:
    """A job on a fresh file of points, queued."""
    recipe = {"model": "mlp", "training_file": live.file_id("points.csv", VECTORS), **recipe}
    response = live.client.post(JOBS, json=recipe)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def events_of(text: str) -> list[dict[str, str]]:
    """Server-sent events as {field: value}."""
    return [
        dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        for block in text.split("\n\n")
        if block.strip() and not block.startswith(":")
    ]


def test_a_job_is_answered_as_openai_has_it(live: Live) -> None:
    job = submit(live, suffix="points", seed=3, hyperparameters={"n_epochs": 2}, metadata={"team": "blue"})
    assert job["object"] == "fine_tuning.job"
    assert (job["status"], job["state"]) == ("queued", "queued")
    assert (job["model"], job["seed"], job["metadata"]) == ("mlp", 3, {"team": "blue"})
    assert job["hyperparameters"]["n_epochs"] == 2
    assert job["method"]["supervised"]["hyperparameters"] == job["hyperparameters"]
    assert job["recipe"]["optimizer"] == "auto"
    assert job["fine_tuned_model"] is None
    assert live.client.get(f"{JOBS}/{job['id']}").json() == job


def test_hyperparameters_may_come_in_openais_newer_place(live: Live) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 7}}}
    assert submit(live, method=method)["hyperparameters"]["n_epochs"] == 7


def test_jobs_are_listed_by_page(start: Start) -> None:
    live = start()
    ids = [submit(live)["id"] for _ in range(3)]
    page = live.client.get(JOBS, params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == [ids[2], ids[1]]
    assert page["has_more"]
    rest = live.client.get(JOBS, params={"after": ids[1]}).json()
    assert [job["id"] for job in rest["data"]] == [ids[0]]
    assert not rest["has_more"]


def test_a_waiting_job_is_cancelled_once(live: Live) -> None:
    job = submit(live)
    cancelled = live.client.post(f"{JOBS}/{job['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert cancelled["finished_at"] is not None
    assert "cancelled already" in message_of(live.client.post(f"{JOBS}/{job['id']}/cancel"), 409)


def test_a_running_job_is_asked_to_stop(start: Start) -> None:
    live = start()
    job_id = submit(live)["id"]
    assert live.store.claim(WORKER) is not None
    answer = live.client.post(f"{JOBS}/{job_id}/cancel").json()
    assert (answer["status"], answer["state"]) == ("validating_files", "validating")
    assert live.store.cancel_requested(WORKER, job_id)


def test_a_job_of_that_id_is_not_there(live: Live) -> None:
    for path in ("", "/events", "/checkpoints", "/events?stream=true"):
        assert "ftjob-none" in message_of(live.client.get(f"{JOBS}/ftjob-none{path}"), 404)
    assert "ftjob-none" in message_of(live.client.post(f"{JOBS}/ftjob-none/cancel"), 404)


def work_through(live: Live, job_id: str, folder: Path) -> None:
    """What a worker writes of a job that succeeds."""
    assert live.store.claim(WORKER) is not None
    live.store.transition(WORKER, job_id, State.RUNNING)
    live.store.add_metrics(job_id, 10, {"train_loss": 0.5})
    live.store.add_checkpoint(WORKER, job_id, 10, folder, {"loss": 0.4})
    live.store.transition(WORKER, job_id, State.EXPORTING)
    live.store.transition(WORKER, job_id, State.SUCCEEDED, result=Published("mlp", 1))


def test_a_finished_job_names_its_model_events_and_checkpoints(start: Start, tmp_path: Path) -> None:
    live = start()
    job_id = submit(live)["id"]
    work_through(live, job_id, tmp_path)
    job = live.client.get(f"{JOBS}/{job_id}").json()
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", "mlp:1")
    assert job["metrics"] == {"step": 10, "train_loss": 0.5}
    events = live.client.get(f"{JOBS}/{job_id}/events").json()["data"]
    assert [event["message"] for event in events][::-1] == [
        *("queued", "validating", "running", "step 10: training loss 0.5000", "exporting", "succeeded")
    ]
    assert events[2]["type"] == "metrics"
    (checkpoint,) = live.client.get(f"{JOBS}/{job_id}/checkpoints").json()["data"]
    assert (checkpoint["step_number"], checkpoint["metrics"]) == (10, {"loss": 0.4})
    assert checkpoint["fine_tuning_job_id"] == job_id


def test_events_come_by_page_newest_first(start: Start, tmp_path: Path) -> None:
    live = start()
    job_id = submit(live)["id"]
    work_through(live, job_id, tmp_path)
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = live.client.get(f"{JOBS}/{job_id}/events", params={"limit": 2, **after}).json()
        seen += [event["message"] for event in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["data"][-1]["id"]}
    assert len(seen) == 6
    assert (seen[0], seen[-1]) == ("succeeded", "queued")


def test_an_event_of_another_job_is_no_cursor(live: Live) -> None:
    first, second = submit(live)["id"], submit(live)["id"]
    event = live.client.get(f"{JOBS}/{first}/events").json()["data"][0]["id"]
    assert event in message_of(live.client.get(f"{JOBS}/{second}/events", params={"after": event}), 404)


def test_a_stream_follows_the_job_to_its_end(start: Start, tmp_path: Path) -> None:
    live = start()
    job_id = submit(live)["id"]
    lines: list[str] = []
    with live.client.stream("GET", f"{JOBS}/{job_id}/events", params={"stream": "true"}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            lines.append(line)
            if '"message":"queued"' in line:  # the stream is open and the job begins only now
                threading.Thread(target=work_through, args=(live, job_id, tmp_path)).start()
    events = events_of("\n".join(lines))
    assert events[-1] == {"data": "[DONE]"}
    assert [json.loads(event["data"])["message"] for event in events[:-1]] == [
        *("queued", "validating", "running", "step 10: training loss 0.5000", "exporting", "succeeded")
    ]
    assert [event["event"] for event in events[:-1]] == ["state", "state", "state", "metrics", "state", "state"]


def test_a_stream_goes_on_behind_the_last_event_seen(start: Start, tmp_path: Path) -> None:
    live = start()
    job_id = submit(live)["id"]
    work_through(live, job_id, tmp_path)
    accept = {"accept": "text/event-stream"}
    whole = events_of(live.client.get(f"{JOBS}/{job_id}/events", headers=accept).text)
    headers = {**accept, "last-event-id": whole[2]["id"]}
    assert events_of(live.client.get(f"{JOBS}/{job_id}/events", headers=headers).text) == whole[3:]


def test_an_open_stream_does_not_hold_up_the_shutdown(start: Start) -> None:
    live = start(drain_seconds=60)
    job_id = submit(live)["id"]
    with httpx.stream("GET", f"{live.address}{JOBS}/{job_id}/events?stream=true", timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        began = time.monotonic()
        live.server.should_exit = True
        for _ in lines:
            pass
        assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"training_file": "file-none"}, 404, "training_file", "file-none"),
        ({"validation_file": "file-none"}, 404, "validation_file", "file-none"),
        ({"model": "gpt-17"}, 404, "model", "GET /v1/models"),
        ({"model": "/etc/passwd"}, 404, "model", "a path is not taken here"),
        ({"model": "../models/bert"}, 404, "model", "a path is not taken here"),
        ({"model": "google/vit-base"}, 404, "model", "allow_hub"),
        ({"model": "efficientnet-lite0"}, 400, "training_file", "holds table"),
        ({"model": {"architecture": "perceptron"}}, 400, "model", "known: alexnet"),
        ({"model": {"architecture": "mlp", "hyperparameters": {"hiden": [8]}}}, 400, "model", "hiden"),
        ({"model": {"architecture": "mlp", "hyperparameters": {"dropout": 2}}}, 400, "model", "$.dropout"),
        ({"model": {"architecture": "mlp", "weights": "minilm-l6-v2"}}, 400, "model.weights", "text_encoder"),
        ({"model": {"architecture": "mlp", "task": {"type": "embedding"}}}, 400, "model.task", "no labels"),
        ({"model": {"architecture": "mlp", "task": {"type": "classification", "classes": 9}}}, 400, "model.task", "2"),
        ({"model": {"architecture": "text_encoder"}}, 400, "model.weights", "tokenizer"),
        ({"model": ""}, 400, "model", "length"),
        ({"optimizer": {"type": "sgd", "momentum": 1.5}}, 400, "optimizer.momentum", "<= 1.0"),
        ({"optimizer": {"type": "lion"}}, 400, "optimizer.type", "lion"),
        ({"optimizer": {"type": "sgd", "momentum": 0, "nesterov": True}}, 400, "optimizer", "a momentum above 0"),
        ({"schedule": {"decay": "step", "milestones": [1.5]}}, 400, "schedule.milestones[0]", "<= 1.0"),
        ({"schedule": {"decay": "cosine", "warm_up": 0.1}}, 400, "schedule", "warm_up"),
        ({"seed": -1}, 400, "seed", ">= 0"),
        ({"augmentation": {"flip": 0.5}}, 400, "augmentation.flip", "not for table"),
        ({"augmentation": {"word_dropout": 0.5}}, 400, "augmentation.word_dropout", "not for table"),
        ({"stopping": {"retrain": "twice"}}, 400, "stopping.retrain", "twice"),
        ({"suffix": "a b"}, 400, "suffix", "regex"),
        ({"suffix": "x" * 64}, 400, "suffix", "give `name`"),
        ({"data": {"label_column": "kind"}}, 400, "training_file", "'kind'"),
        ({"objective": {"type": "cross_entropy", "class_weights": {"aside": 2.0}}}, 400, None, "'aside'"),
        ({"objective": {"type": "translation"}}, 400, "objective", "mlp cannot learn by translation"),
        ({"objective": {"type": "squared_error"}}, 400, "training_file", "'label' holds no numbers"),
        ({"objective": {"type": "squared_error"}, "data": {"target_columns": ["z"]}}, 400, "training_file", "'z'"),
        ({"objective": {"type": "multi_task", "heads": {}}}, 400, "objective.heads", "length"),
        ({"objective": {"type": "multi_task", "heads": {"side": {}}}}, 400, "training_file", "'side'"),
        ({"stopping": {"metric": "rmse"}}, 400, "stopping.metric", "it measures loss, accuracy, macro_f1"),
        ({"terms": [{"type": "coral", "file": "file-none"}]}, 404, "terms", "file-none"),
        ({"terms": [{"type": "features", "norm": 3}]}, 400, "terms[0].norm", "3"),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations", "leave it out"),
        ({"hyperparameters": {}, "method": {"type": "supervised"}}, 400, "hyperparameters", "not in both"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_recipe_is_said_at_once(
    live: Live, change: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    recipe = {"model": "mlp", "training_file": live.file_id("points.csv", VECTORS), **change}
    response = live.client.post(JOBS, json=recipe)
    assert words in message_of(response, status)
    if param is not None:
        assert response.json()["error"]["param"] == param


def test_a_job_on_a_deleted_file(live: Live) -> None:
    file_id = live.file_id("points.csv", VECTORS)
    live.client.delete(f"/v1/files/{file_id}")
    response = live.client.post(JOBS, json={"model": "mlp", "training_file": file_id})
    assert file_id in message_of(response, 404)


def test_retraining_needs_the_validation_split_of_the_training_file(live: Live) -> None:
    file_id = live.file_id("points.csv", VECTORS)
    stopping = {"retrain": "scratch"}
    recipe = {"model": "mlp", "training_file": file_id, "validation_file": file_id, "stopping": stopping}
    response = live.client.post(JOBS, json=recipe)
    assert "leave validation_file out" in message_of(response, 400)
    assert response.json()["error"]["param"] == "stopping.retrain"


def test_a_validation_file_of_another_kind(live: Live) -> None:
    recipe = {
        "model": "mlp",
        "training_file": live.file_id("points.csv", VECTORS),
        "validation_file": live.file_id("days.csv", SENTIMENTS),
    }
    assert "validation_file: holds text" in message_of(live.client.post(JOBS, json=recipe), 400)


def test_one_unit_tells_two_classes_apart_and_no_more(live: Live) -> None:
    rows = "".join(f"{i},{i * i},{'abc'[i % 3]}\n" for i in range(30))
    recipe = {"model": "mlp", "training_file": live.file_id("three.csv", f"x,y,label\n{rows}".encode())}
    response = live.client.post(JOBS, json={**recipe, "objective": {"type": "binary_cross_entropy"}})
    assert "has 3: a, b, c; take cross_entropy" in message_of(response, 400)
    assert response.json()["error"]["param"] == "objective"
    heads = {"label": {"objective": {"type": "binary_cross_entropy"}}}
    response = live.client.post(JOBS, json={**recipe, "objective": {"type": "multi_task", "heads": heads}})
    assert response.json()["error"]["param"] == "objective.heads.label"


def test_a_domain_to_adapt_to_is_like_the_training_data_and_is_kept(live: Live) -> None:
    training = live.file_id("points.csv", VECTORS)

    def submitted(filename: str, content: bytes, **more: Any) -> tuple[str, httpx.Response]:
        file_id = live.file_id(filename, content)
        terms = [{"type": "coral", "file": file_id}]
        return file_id, live.client.post(JOBS, json={"model": "mlp", "training_file": training, "terms": terms, **more})

    assert "no numbers in a column 'x'" in message_of(submitted("days.csv", SENTIMENTS)[1], 400)
    assert "no numbers in a column 'y'" in message_of(submitted("x.csv", b"x\n1\n2\n")[1], 400)
    other = b"y,x\n" + b"".join(b"%d,%d\n" % (i, 2 * i) for i in range(20))
    file_id, response = submitted("others.csv", other)
    assert response.status_code == 200, response.text
    assert "is needed by job" in message_of(live.client.delete(f"/v1/files/{file_id}"), 409)
    live.client.post(f"{JOBS}/{response.json()['id']}/cancel")
    assert live.client.delete(f"/v1/files/{file_id}").status_code == 200


def test_confidence_is_no_term_of_numbers(live: Live) -> None:
    recipe = {"model": "mlp", "training_file": live.file_id("points.csv", VECTORS), "data": {"label_column": "y"}}
    recipe |= {"objective": {"type": "squared_error"}, "terms": [{"type": "confidence"}]}
    assert "answers of classes or labels" in message_of(live.client.post(JOBS, json=recipe), 400)
