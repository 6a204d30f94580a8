"""What the training loop measures of itself, and when it says so."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from finetune.checkpoint import Progress
from finetune.run_request import JobFailed, Reporter

# Points of the training curve in a whole run, and the least seconds between two reports.
CURVE_POINTS = 400
REPORT_SECONDS = 0.5


class Meter:
    """Training loss, curve, samples a second and time left. Fills `progress.curve` and `progress.evaluations`.

    Points of the curve are at fixed steps, so that a resumed run has the same curve; reports follow the clock.
    """

    def __init__(
        self,
        progress: Progress,
        steps: int,
        epoch_steps: int,
        reporter: Reporter,
        device: torch.device,
        steps_in_round: int = 1,
    ) -> None:
        """steps_in_round: of an objective that takes several; points of the curve are at the ends of rounds."""
        self.progress = progress
        self.steps = steps
        self.epoch_steps = epoch_steps
        self.reporter = reporter
        self.steps_in_round = steps_in_round
        self.every = math.ceil(steps / CURVE_POINTS / steps_in_round) * steps_in_round
        # On the device and in float64: nothing waits for a step's loss, and a resumed sum is the same sum.
        self.loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=device)
        self.rate = 0.0
        self.gradient_norm: Tensor | None = None
        self.first = progress.step
        self.began = self.reported = time.monotonic()
        self.items = 0
        self.pace = 0.0

    def at_point(self, step: int) -> bool:
        """Whether the curve has a point after `step` steps."""
        return step % self.every == 0

    def in_round_of_point(self, step: int) -> bool:
        """Whether step number `step` (from 1) is one of the round that a point of the curve is behind."""
        return -step % self.every < self.steps_in_round

    def add(self, loss: Tensor, weight: float, items: int, rate: float, gradient_norm: Tensor | None) -> None:
        """After a step: `loss` is the sum over its `items`, `weight` what it is divided by.

        Raises JobFailed when the loss is no number, at the latest when it is next reported.
        """
        self.loss_sum += loss
        self.progress.weight_sum += weight
        self.items += items
        self.rate = rate
        self.gradient_norm = gradient_norm
        if self.at_point(self.progress.step):
            self._add_point()
        if time.monotonic() - self.reported >= REPORT_SECONDS:
            self.report({})

    def evaluated(self, figures: dict[str, float]) -> None:
        """After an evaluation of the validation split. Raises JobFailed when a loss is no number."""
        if self.progress.weight_sum > 0.0:
            self._add_point()
        self._check(figures["loss"], "validation")
        validation = {f"validation_{name}": value for name, value in figures.items()}
        evaluation = {**self._position(), "train_loss": self._loss_since_evaluation(), **validation}
        self.progress.evaluations.append(evaluation)
        self.report(validation)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in validation.items())
        self.reporter.event(
            f"epoch {evaluation['epoch']:.3g}: training loss {evaluation['train_loss']:.4f}, {shown}",
            type="evaluation",
            data=evaluation,
        )

    def train_loss(self) -> float:
        """Mean since the last point of the curve; right after one, that point's own."""
        if self.progress.weight_sum == 0.0:
            return self.progress.curve[-1]["train_loss"]
        return self._check(float(self.loss_sum) / self.progress.weight_sum, "training")

    def report(self, validation: dict[str, float]) -> None:
        now = time.monotonic()
        if self.items:
            self.pace = self.items / max(now - self.reported, 1e-9)
        done = self.progress.step - self.first
        self.reporter.metrics(
            self.progress.step,
            epoch=self.progress.step / self.epoch_steps,
            total_steps=self.steps,
            train_loss=self.train_loss(),
            learning_rate=self.rate,
            gradient_norm=None if self.gradient_norm is None else float(self.gradient_norm),
            samples_per_second=self.pace,
            # Evaluations and checkpoints so far are in the time a step took so far.
            eta_seconds=(now - self.began) / done * (self.steps - self.progress.step),
            **validation,
        )
        self.reported = now
        self.items = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done here does not count against the samples a second."""
        begin = time.monotonic()
        yield
        self.reported += time.monotonic() - begin

    def _position(self) -> dict[str, float]:
        return {"step": self.progress.step, "epoch": self.progress.step / self.epoch_steps}

    def _add_point(self) -> None:
        point = {"train_loss": self.train_loss(), "learning_rate": self.rate}
        self.progress.curve.append({**self._position(), **point})
        self.loss_sum.zero_()
        self.progress.weight_sum = 0.0

    def _loss_since_evaluation(self) -> float:
        """Mean training loss since the evaluation before; every step counts alike."""
        before = self.progress.evaluations[-1]["step"] if self.progress.evaluations else 0.0
        points = [point for point in self.progress.curve if point["step"] > before]
        steps = np.diff([before, *(point["step"] for point in points)])
        return float(np.average([point["train_loss"] for point in points], weights=steps))

    def _check(self, loss: float, which: str) -> float:
        if not math.isfinite(loss):
            raise JobFailed(
                f"the {which} loss became {loss} by step {self.progress.step}: training diverged. Lower the learning "
                f"rate (it was {self.rate:.3g}), set gradient_clip, or use precision float32"
            )
        return loss
