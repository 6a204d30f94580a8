"""A real Prometheus reads a real server under load of every kind: every query of every panel gets data, every rule and
alert can be evaluated, and promtool likes the exposition."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import yaml
from PIL import Image

from deploy.grafana.files import DASHBOARDS, FOLDER
from deploy.grafana.picture import Span, draw
from deploy.grafana.questions import Question, filled, questions
from deploy.prometheus import local
from deploy.prometheus.local import Prometheus
from finetune.jobs.states import State
from finetune.recipe import Recipe
from server import machine_metrics
from server.keys import KeyStore, Limits
from server.runtime.deployment import Cache, Deployment, Shadow, write
from server.runtime.footprint import footprint
from server.settings import Settings
from tests.server import nvml
from tests.server.bundles import publish_moods, publish_sides, publish_texts, publish_vectors
from tests.server.chains import publish_language_model, publish_letters
from tests.server.conftest import VECTORS, Live, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(local.program("prometheus") is None, reason="no prometheus here; deploy/prometheus/fetch.sh"),
]
RULES = Path(local.FOLDER) / "rules"
WINDOW = "10s"
EVERYTHING = {"job": ".*", "instance": ".*", "model": ".*", "version": ".*", "__rate_interval": WINDOW}
LOAD_SECONDS = 14.0


class Watched(NamedTuple):
    live: Live
    key: str
    prometheus: Prometheus
    began: float
    ended: float


def repository(folder: Path) -> int:
    """Models of several kinds: two versions side by side, a shadow, a cache, writers of texts, two lazy ones that do
    not fit beside each other, and a damaged one. Returns the memory, in bytes, that they may take."""
    kept = [
        publish_vectors(folder, "points"),
        publish_vectors(folder, "points"),
        publish_texts(folder, "days"),
        publish_letters(folder, "letters"),
        publish_language_model(folder, "tales"),
    ]
    shared = {"1": 0.7, "2": 0.3}
    write(folder / "points", Deployment(aliases={"production": 1}, traffic=shared, shadow=Shadow(version=2)))
    write(folder / "days", Deployment(cache=Cache(ttl_seconds=60, max_bytes=2000)))
    write(folder / "letters", Deployment(queue_limit=2))
    lazy = [publish_sides(folder), publish_moods(folder)]
    for manifest in lazy:
        write(folder / manifest.name, Deployment(lazy=True))
    damaged = publish_vectors(folder, "damaged")
    (folder / "damaged" / str(damaged.version) / "model.onnx").write_bytes(b"no graph")
    return sum(map(footprint, kept)) + round(1.5 * max(map(footprint, lazy)))


def job_of(live: Live, name: str) -> Callable[[], None]:
    """A job that runs; calling what comes back reports a step of it."""
    file = live.store.add_file(
        id=f"file-{name}", filename="points.csv", purpose="fine-tune", bytes=len(VECTORS), sha256="", report="{}"
    )
    job = live.store.create_job(Recipe(model="mlp", training_file=file.id), name)
    assert live.store.claim("worker") is not None
    live.store.transition("worker", job.id, State.RUNNING)
    step = 0

    def report() -> None:
        nonlocal step
        step += 10
        figures = {
            "total_steps": 1000,
            "epoch": step / 100,
            "train_loss": 1 / step,
            "learning_rate": 1e-3,
            "gradient_norm": 0.5,
            "samples_per_second": 900,
            "eta_seconds": 12,
            "validation_loss": 2 / step,
            "validation_accuracy": 0.9,
        }
        live.store.add_metrics(job.id, step, figures)

    return report


def grpc_caller(live: Live, key: str, until: float) -> None:
    tensor = tritonclient.grpc.InferInput("vector", [3, 2], "FP32")
    tensor.set_data_from_numpy(np.ones((3, 2), np.float32))
    address = f"127.0.0.1:{live.server.application.state.grpc_port}"
    with tritonclient.grpc.InferenceServerClient(address) as triton:
        while time.time() < until:
            triton.infer("points", [tensor], headers={"authorization": f"Bearer {key}"})
            time.sleep(0.2)


def load(live: Live, key: str, until: float) -> None:
    """Callers of every kind, each a thread, until then."""
    rng = np.random.default_rng(0)

    def caller(requests: list[tuple[str, dict[str, object]]], pause: float, **headers: str) -> None:
        with httpx.Client(
            base_url=live.address, timeout=30, headers={"authorization": f"Bearer {key}"} | headers
        ) as http:
            while time.time() < until:
                for path, body in requests:
                    http.post(path, json=body)
                time.sleep(pause)

    classify = "/v1/classify"
    points: list[tuple[str, dict[str, object]]] = [
        (classify, {"model": "points", "input": rng.normal(size=(rows, 2)).tolist()}) for rows in (1, 2, 8, 32)
    ]
    in_turn: list[tuple[str, dict[str, object]]] = [
        (classify, {"model": name, "input": [1.0, -1.0]}) for name in ("sides", "moods")
    ]
    texts: list[tuple[str, dict[str, object]]] = [
        (classify, {"model": "days", "input": "good day" + " good" * (number % 7) + " bad" * (number // 7)})
        for number in (*range(20), 0, 0)
    ]
    mistakes: list[tuple[str, dict[str, object]]] = [
        (classify, {"model": "nobody", "input": [0, 1]}),
        (classify, {"model": "points", "input": "no vector"}),
        ("/v1/embeddings", {"model": "points", "input": [[0.5, 1.0]]}),
    ]
    writing: list[tuple[str, dict[str, object]]] = [
        ("/v1/completions", {"model": "letters", "prompt": "a long way to go, ", "max_tokens": 40, "temperature": 1}),
        ("/v1/completions", {"model": "tales", "prompt": "the", "max_tokens": 8}),
    ]
    threads = [
        threading.Thread(target=caller, args=(points, 0.05)),
        threading.Thread(target=caller, args=(texts, 0.05)),
        threading.Thread(target=caller, args=(in_turn, 0.5)),
        threading.Thread(target=caller, args=(mistakes, 0.1)),
        threading.Thread(target=grpc_caller, args=(live, key, until)),
        threading.Thread(target=caller, args=(mistakes[2:], 0.2), kwargs={"authorization": "Bearer esp_unknown"}),
        *(threading.Thread(target=caller, args=(writing, 0.0)) for _ in range(6)),
    ]
    for thread in threads:
        thread.start()
    report = job_of(live, "learner")
    while time.time() < until:
        report()
        time.sleep(0.5)
    for thread in threads:
        thread.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found: int = free.getsockname()[1]
        return found


def wait_for(live: Live, key: str) -> None:
    """Until every process knows the key."""
    deadline = time.monotonic() + 20
    known = 0
    while known < 5:
        assert time.monotonic() < deadline
        known += live.client.get("/metrics", headers={"authorization": f"Bearer {key}"}).status_code == 200
        known += live.client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        time.sleep(0.2)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    home = tmp_path_factory.mktemp("home")
    settings = Settings(
        home=home,
        port=0,
        worker=False,
        auth="on",
        generation_slots=1,
        frontends=1,
        grpc_port=free_port(),
        model_memory_bytes=repository(home / "repository"),
    )
    with pytest.MonkeyPatch.context() as patched, ExitStack() as opened:
        # The machine that runs this test has no GPU: its figures come from a stand-in for NVIDIA's library.
        patched.setattr(machine_metrics, "pynvml", nvml.fake(cards=2))
        live = opened.enter_context(running(settings))
        key, _ = KeyStore(live.store).create("test", ["admin"], Limits())
        wait_for(live, key)
        target = live.address.removeprefix("http://")
        prometheus = opened.enter_context(local.running(home / "prometheus", [target], key=key))
        began = time.time()
        load(live, key, began + LOAD_SECONDS)
        yield Watched(live, key, prometheus, began, time.time())


def asked() -> list[tuple[str, Question]]:
    return [
        (name, question)
        for name in DASHBOARDS
        for question in questions(json.loads((FOLDER / f"{name}.json").read_text()), EVERYTHING)
    ]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_query_of_every_panel_gets_data(name: str, watched: Watched) -> None:
    empty = []
    for question in (question for of, question in asked() if of == name):
        if question.kind == "table":
            series = watched.prometheus.at(question.expr, watched.ended)
        else:
            series = watched.prometheus.over(question.expr, watched.began, watched.ended, 1.0)
        if not any(one.values for one in series):
            empty.append(f"{question.panel}: {question.expr}")
    assert not empty, "\n".join(empty)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_drawn(name: str, watched: Watched, tmp_path: Path) -> None:
    dashboard = json.loads((FOLDER / f"{name}.json").read_text())
    path = tmp_path / f"{name}.png"
    draw(dashboard, watched.prometheus, EVERYTHING, Span(watched.began, watched.ended), path)
    with Image.open(path) as picture:
        assert picture.width == 1600
        assert picture.height > 30 * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
        assert len(picture.convert("RGB").getcolors(1000) or ()) > 10
    assert path.stat().st_size < 300_000


def test_every_variable_has_values_to_choose_from(watched: Watched) -> None:
    for name in DASHBOARDS:
        for variable in json.loads((FOLDER / f"{name}.json").read_text())["templating"]["list"]:
            if variable["type"] != "query":
                continue
            selector, _, label = (
                variable["query"]["query"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
            )
            fields = {"match[]": filled(selector, EVERYTHING)}
            assert watched.prometheus.get(f"/api/v1/label/{label}/values", **fields), variable["name"]


def test_every_rule_is_evaluated_and_nothing_alarms_that_should_not(watched: Watched) -> None:
    groups = watched.prometheus.get("/api/v1/rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    written = [
        rule
        for path in RULES.glob("*.yml")
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]
    assert len(rules) == len(written)
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    firing = {rule["name"] for rule in rules if rule["type"] == "alerting" and rule["state"] == "firing"}
    assert "EspalierBundleRefused" in firing  # a damaged one is there
    assert firing <= {"EspalierBundleRefused", "EspalierLoadFailed"}


def test_recording_rules_record(watched: Watched) -> None:
    names = [
        rule["record"]
        for group in yaml.safe_load((RULES / "recording.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    assert [name for name in names if not watched.prometheus.at(name, watched.ended)] == []


def test_promtool_likes_the_exposition(watched: Watched) -> None:
    promtool = local.program("promtool")
    assert promtool is not None
    text = httpx.get(f"{watched.live.address}/metrics", headers={"authorization": f"Bearer {watched.key}"}).text
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("espalier")]
    assert ours == []
