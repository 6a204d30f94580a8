"""The states of a job, and which may follow which."""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    QUEUED = "queued"
    VALIDATING = "validating"
    RUNNING = "running"
    EXPORTING = "exporting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ACTIVE = frozenset({State.VALIDATING, State.RUNNING, State.EXPORTING})
FINISHED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})

# A worker that gives a job up, or loses it, sends it back to the queue from wherever it was.
FOLLOWERS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.VALIDATING, State.FAILED, State.CANCELLED}),
    State.VALIDATING: frozenset({State.RUNNING, State.QUEUED, State.FAILED, State.CANCELLED}),
    State.RUNNING: frozenset({State.EXPORTING, State.QUEUED, State.FAILED, State.CANCELLED}),
    State.EXPORTING: frozenset({State.SUCCEEDED, State.QUEUED, State.FAILED, State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


class IllegalTransition(ValueError):
    """A job cannot go from the state it is in to the one asked for."""


def check(job_id: str, now: State, wanted: State) -> None:
    """Raises IllegalTransition unless `wanted` may follow `now`."""
    if wanted not in FOLLOWERS[now]:
        raise IllegalTransition(f"job {job_id} is {now}; it cannot become {wanted}")
