"""The dashboard of jobs."""

from __future__ import annotations

from deploy.grafana.layout import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    YELLOW,
    Dashboard,
    Panel,
    Query,
    Row,
)
from deploy.grafana.queries import (
    JOB,
)

STATES = {
    "queued": GREY,
    "validating": BLUE,
    "running": YELLOW,
    "exporting": PURPLE,
    "succeeded": GREEN,
    "failed": RED,
    "cancelled": ORANGE,
}
# Servers of one database all tell the same.
LEARNING = 'job=~"$job"'


def jobs(state: str) -> str:
    return f'max(espalier_jobs{{{LEARNING}, state="{state}"}})'


def followed(metric: str) -> list[Query]:
    return [Query(f"max by (job_id, model) ({metric}{{{LEARNING}}})", "{{model}} {{job_id}}")]


FINE_TUNING = Dashboard(
    uid="espalier-fine-tuning",
    title="Espalier / Fine-tuning",
    words="Jobs by state, and how those that run are learning.",
    variables=[JOB],
    rows=[
        Row(
            "Jobs",
            [
                *(
                    Panel(
                        state.capitalize(),
                        words,
                        "short",
                        [Query(jobs(state), state)],
                        kind="stat",
                        width=4,
                        thresholds=thresholds,
                    )
                    for state, words, thresholds in (
                        ("queued", "Jobs that wait for a worker.", [(10.0, YELLOW)]),
                        ("running", "Jobs that train.", []),
                        ("exporting", "Jobs that are evaluated, exported and compared.", []),
                        ("succeeded", "Jobs that published a model.", []),
                        ("failed", "Jobs that ended with an error.", [(0.5, ORANGE)]),
                        ("cancelled", "Jobs that were called off.", []),
                    )
                ),
                Panel(
                    "Jobs at work",
                    "By state. Jobs that stay queued with none at work want a worker.",
                    "short",
                    [
                        Query(
                            f'max by (state) (espalier_jobs{{{LEARNING}, state!~"succeeded|failed|cancelled"}})',
                            "{{state}}",
                        )
                    ],
                    width=12,
                    stacked=True,
                    colors=STATES,
                ),
                Panel(
                    "Finished jobs",
                    "By how they ended, of all that the store knows.",
                    "short",
                    [
                        Query(
                            f'max by (state) (espalier_jobs{{{LEARNING}, state=~"succeeded|failed|cancelled"}})',
                            "{{state}}",
                        )
                    ],
                    width=12,
                    colors=STATES,
                ),
            ],
        ),
        Row(
            "Learning",
            [
                Panel("Training loss", "Mean since the last report.", "short", followed("espalier_training_loss")),
                Panel(
                    "Validation loss",
                    "At the newest evaluation. Rising while the training loss falls: it learns by heart.",
                    "short",
                    followed("espalier_training_validation_loss"),
                ),
                Panel(
                    "Validation metrics",
                    "At the newest evaluation: accuracy, perplexity and others, by task.",
                    "short",
                    [
                        Query(
                            f"max by (job_id, model, metric) (espalier_training_validation_metric{{{LEARNING}}})",
                            "{{model}} {{metric}} {{job_id}}",
                        )
                    ],
                ),
                Panel("Samples a second", "Training items.", "short", followed("espalier_training_samples_per_second")),
                Panel(
                    "Learning rate",
                    "By the schedule.",
                    "sci",
                    followed("espalier_training_learning_rate"),
                ),
                Panel(
                    "Gradient norm",
                    "Of all gradients together, before it is clipped. Spikes are steps that went too far.",
                    "short",
                    followed("espalier_training_gradient_norm"),
                ),
                Panel(
                    "Progress",
                    "Share of its steps that a job has done.",
                    "percentunit",
                    followed("espalier_training_progress_ratio"),
                    most=1,
                ),
                Panel(
                    "Time left",
                    "Estimated, to the end of the training.",
                    "s",
                    followed("espalier_training_remaining_seconds"),
                ),
                Panel("Epochs", "That are done.", "short", followed("espalier_training_epoch")),
            ],
        ),
    ],
)
