"""What /metrics tells of fine-tuning jobs: their states, and what a worker last reported of those that run."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from finetune.jobs.states import State
from tests.server.conftest import VECTORS, Live, Start

WORKER = "the worker of this test"


def scrape(live: Live) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(value for label, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(live.client.get("/metrics").text)
        for sample in family.samples
        if sample.name.startswith(("espalier_jobs", "espalier_training"))
    }


def test_a_running_job_is_followed_by_what_its_worker_reports(start: Start) -> None:
    live = start()
    recipe = {"model": "mlp", "training_file": live.file_id("points.csv", VECTORS), "name": "points"}
    job = live.client.post("/v1/fine_tuning/jobs", json=recipe).json()["id"]
    assert scrape(live)["espalier_jobs", "queued"] == 1
    assert live.store.claim(WORKER) is not None
    live.store.transition(WORKER, job, State.RUNNING)
    figures = {
        "train_loss": 0.75,
        "learning_rate": 0.01,
        "total_steps": 40,
        "samples_per_second": 320,
        "eta_seconds": 6,
    }
    live.store.add_metrics(job, 10, figures)
    live.store.add_metrics(job, 30, {**figures, "validation_loss": 0.5, "validation_accuracy": 0.875})
    found = scrape(live)
    assert (found["espalier_jobs", "queued"], found["espalier_jobs", "running"]) == (0, 1)
    assert found["espalier_training_loss", job, "points"] == 0.75
    assert found["espalier_training_learning_rate", job, "points"] == 0.01
    assert found["espalier_training_samples_per_second", job, "points"] == 320
    assert found["espalier_training_remaining_seconds", job, "points"] == 6
    assert found["espalier_training_progress_ratio", job, "points"] == 0.75
    assert found["espalier_training_validation_loss", job, "points"] == 0.5
    assert found["espalier_training_validation_metric", job, "accuracy", "points"] == 0.875
    live.store.transition(WORKER, job, State.CANCELLED)
    assert not [name for name, *_ in scrape(live) if name.startswith("espalier_training")]
