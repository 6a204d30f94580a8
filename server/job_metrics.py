"""Gauges of fine-tuning jobs, read from the job store when they are asked for: other processes write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric

# By what a worker calls them.
FIGURES = {
    "train_loss": ("loss", "training loss"),
    "validation_loss": ("validation_loss", "loss on the validation split, at its newest evaluation"),
    "learning_rate": ("learning_rate", "learning rate"),
    "gradient_norm": ("gradient_norm", "norm of all gradients together, before it is clipped"),
    "epoch": ("epoch", "epochs done"),
    "samples_per_second": ("samples_per_second", "training items a second"),
    "eta_seconds": ("remaining_seconds", "estimated time to the end of the training"),
}
LABELS = ("job_id", "model")  # `job` is Prometheus's own


class JobGauges:
    """A collector of prometheus-client. states: jobs by state. training: figures of every running job, by its id and
    the name it will publish."""

    def __init__(self) -> None:
        self.states: Callable[[], Mapping[str, int]] | None = None
        self.training: Callable[[], Mapping[tuple[str, str], Mapping[str, float]]] | None = None

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("espalier_jobs", "fine-tuning jobs in a state", labels=["state"])
        for state, count in (self.states() if self.states else {}).items():
            jobs.add_metric([state], count)
        yield jobs
        figures = {
            key: GaugeMetricFamily(f"espalier_training_{name}", f"{words}, of a running job", labels=LABELS)
            for key, (name, words) in FIGURES.items()
        }
        progress = GaugeMetricFamily(
            "espalier_training_progress_ratio", "share of its steps that a running job has done", labels=LABELS
        )
        judged = GaugeMetricFamily(
            "espalier_training_validation_metric",
            "a metric on the validation split, at its newest evaluation, of a running job",
            labels=[*LABELS, "metric"],
        )
        for job, values in (self.training() if self.training else {}).items():
            for key, value in values.items():
                if key in figures:
                    figures[key].add_metric(job, value)
                elif key.startswith("validation_"):
                    judged.add_metric([*job, key.removeprefix("validation_")], value)
            if steps := values.get("total_steps"):
                progress.add_metric(job, values.get("step", 0) / steps)
        yield from (*figures.values(), progress, judged)
