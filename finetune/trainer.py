"""The training loop.

One loop over optimizer steps. The random numbers of step k follow from (seed, k) and the order of epoch e from
(seed, e), so a run that is interrupted anywhere and goes on from a checkpoint ends with the same weights, bit for bit
on a CPU. On several processes (accelerate's launcher) each step's items are divided among them and their gradients
summed, so a recipe trains the same network on one device or on eight; every process evaluates, the first one writes
the checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# DistributedDataParallel imports it when the first network is wrapped; its functions' defaults would then hold the
# process group for ever, whose threads, never joined, may drop a last tensor while the interpreter ends, and abort it.
import torch.distributed.nn.functional
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from torch import Tensor, nn

from finetune import augmentation, automatic, checkpoint, optim
from finetune.batches import steps_in_epoch, training_order
from finetune.checkpoint import Checkpoint, GradientNorms, Progress
from finetune.evaluate import evaluate, figures
from finetune.meter import Meter
from finetune.objectives.objective import Objective
from finetune.preprocess import Items, tensors
from finetune.recipe import Recipe, Schedule, Stopping
from finetune.recomputation import recompute
from finetune.run_request import Cancelled, Reporter
from finetune.terms import Term
from models import registry
from models.network import Network


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """steps: done, of `planned`. best_metrics: "loss" and the objective's own on validation, after `best_step` steps.

    curve, evaluations, gradient_norms: as in `checkpoint.Progress`.
    """

    steps: int
    planned: int
    best_step: int
    best_metrics: dict[str, float]
    curve: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    gradient_norms: list[GradientNorms]


@dataclass(frozen=True, kw_only=True)
class Until:
    """When a retraining ends, with the weights of its last step: after `step` steps, or once the validation loss is
    less than `below`. Only the latter evaluates."""

    step: int | None = None
    below: float | None = None


def fit(
    network: Network,
    train: Items,
    validation: Items,
    objective: Objective,
    recipe: Recipe,
    chosen: automatic.Chosen,
    *,
    seed: int,
    run: str,
    folder: Path,
    reporter: Reporter,
    terms: Sequence[Term] = (),
    until: Until | None = None,
) -> FitResult:
    """Train `network` in place, and leave it on the device it was trained on.

    Without `until` it ends with the weights of its best evaluation: the one with the best `recipe.stopping.metric`, or
    with the lowest validation loss when the recipe does not stop early; of equals the first.

    terms: added to the loss while it learns; losses are reported without them.
    run: fingerprint of recipe and data; a checkpoint of the same run in `folder` is gone on from.
    Raises Cancelled within a step of the reporter saying so, JobFailed when the loss is no longer a number,
    ValueError for a recipe that cannot be followed (unknown block, precision the device does not have, layers that
    cannot be computed again).
    """
    accelerator = accelerate(recipe.precision, some_idle=objective.steps_in_round > 1)
    network.to(accelerator.device)
    if network.input_names == ("pixels",):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which its stub lacks
    section = chosen.optimizer if recipe.optimizer == "auto" else recipe.optimizer
    optimizer = optim.build(network, section, recipe.transfer)
    fixed = optim.fixed(network, recipe.transfer)
    if fixed:
        run = f"{run} on {checkpoint.digest(fixed)}"
    if recipe.gradient_checkpointing:
        recompute(network)
    frozen: Sequence[nn.Module] = optim.frozen_blocks(network, recipe.transfer.freeze, recipe.transfer.train_last)
    held = frozen
    augment = augmentation.build(recipe.augmentation)

    step_items = chosen.batch_size * recipe.gradient_accumulation
    epoch_steps = steps_in_epoch(len(train), step_items)
    steps = epoch_steps * chosen.epochs
    evaluations = evaluation_positions(epoch_steps, recipe.evaluations_per_epoch)
    last = steps
    if until is not None and until.step is not None:
        evaluations, last = set(), min(until.step, steps)

    def state() -> dict[str, Tensor]:
        """What another process needs beside the weights that the run began with."""
        return {name: tensor for name, tensor in registry.tensors(network).items() if name not in fixed}

    progress, best = resume(network, optimizer, accelerator, folder, run, reporter)
    meter = Meter(progress, steps, epoch_steps, reporter, accelerator.device, objective.steps_in_round)
    first = progress.step
    saved = time.monotonic()

    def check() -> None:
        if reporter.cancelled():
            raise Cancelled

    for step in range(first, first if progress.stopped else last):
        check()
        epoch, position = divmod(step, epoch_steps)
        if position == 0 or step == first:
            lengths = None if objective.packs else train.lengths
            order = training_order(len(train), step_items, seed, epoch, lengths)
            before, held = held, optim.still_frozen(frozen, recipe.transfer, epoch)
            optim.set_mode(network, held)
            if step == first or len(held) != len(before):
                accelerator.free_memory()  # DDP's hooks are for the parameters that learned when it was made
                model, stepper = accelerator.prepare(network, optimizer)

        rate = optim.learning_rate(recipe.schedule, chosen.learning_rate, step, steps, progress.plateaus)
        optim.set_learning_rate(optimizer, rate)
        seed_generators(accelerator.device, seed, step, accelerator.process_index)
        with optim.noisy(network, recipe.regularization.weight_noise):
            loss, weight = gradients(
                accelerator, model, objective, terms, train, order[position], recipe, augment, step
            )
        if meter.in_round_of_point(step + 1):
            progress.gradient_norms.append(GradientNorms(step + 1, gradient_norms(accelerator, network)))
        norm = None
        if recipe.gradient_clip is not None:
            norm = accelerator.clip_grad_norm_(network.parameters(), recipe.gradient_clip)
        stepper.step()
        if recipe.regularization.l1:
            optim.shrink(optimizer, recipe.regularization.l1)
        stepper.zero_grad()

        progress.step = step + 1
        meter.add(loss, weight, len(order[position]), rate, norm)
        if position + 1 in evaluations:
            with meter.paused():
                share_buffers(accelerator, network)
                measured = evaluate(network, validation, objective, 2 * chosen.batch_size, check)
                found = figures(measured, validation, objective)
                optim.set_mode(network, held)
            meter.evaluated(found)
            watch_plateau(progress, found["loss"], recipe.schedule)
            if until is not None:
                progress.stopped = until.below is not None and found["loss"] < until.below
            elif judge(progress, found, recipe.stopping, objective):
                best = {name: tensor.cpu().clone() for name, tensor in state().items()}
        ended = progress.stopped or progress.step == last
        if accelerator.is_main_process and (ended or time.monotonic() - saved >= recipe.checkpoint_seconds):
            with meter.paused():
                progress.loss_sum = float(meter.loss_sum)
                progress.scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
                path = checkpoint.save(folder, Checkpoint(progress, state(), optim.state_tensors(optimizer), best))
            reporter.checkpoint(progress.step, path, progress.best_metrics)
            saved = time.monotonic()
        if ended:
            break

    accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if until is None:
        put_back(network, best)
    network.eval()
    return FitResult(
        steps=progress.step,
        planned=steps,
        best_step=progress.best_step,
        best_metrics=progress.best_metrics,
        curve=progress.curve,
        evaluations=progress.evaluations,
        gradient_norms=progress.gradient_norms,
    )


def accelerate(precision: str, *, some_idle: bool) -> Accelerator:
    """An Accelerator of the recipe's precision. some_idle: whether steps leave parts of the network without gradients;
    several processes would wait for those for ever. Raises ValueError when the device does not have the precision."""
    AcceleratorState._reset_state()  # it outlives its Accelerator, and refuses another precision
    device = Accelerator().device
    AcceleratorState._reset_state()
    idle = DistributedDataParallelKwargs(find_unused_parameters=some_idle)
    return Accelerator(mixed_precision=automatic.precision(precision, device), kwargs_handlers=[idle])


def gradients(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    terms: Sequence[Term],
    items: Items,
    positions: np.ndarray,
    recipe: Recipe,
    augment: augmentation.Augment | None,
    step: int,
) -> tuple[Tensor, float]:
    """Add the gradients of the mean loss over `positions`, this process's share of them piece by piece.

    Returns the sum of the loss over all of them, without the terms, and the weight that makes it a mean. Every piece is
    divided by the weight of the whole step, so that accumulating changes memory and nothing else. A term is a mean over
    its piece, and counts by the items in it.
    """

    def change(inputs: list[Tensor]) -> tuple[list[Tensor], augmentation.Mix | None]:
        if augment is not None:
            pixels, mix = augment(inputs[0])
            return [pixels, *inputs[1:]], mix
        if recipe.augmentation.word_dropout:
            return [inputs[0], augmentation.drop_words(inputs[1], recipe.augmentation.word_dropout), *inputs[2:]], None
        return inputs, None

    weight = objective.weight(torch.from_numpy(items.batch_targets(positions)))
    mine = np.array_split(positions, accelerator.num_processes)[accelerator.process_index]
    pieces = [piece for piece in np.array_split(mine, recipe.gradient_accumulation) if len(piece)]
    total = torch.zeros((), device=accelerator.device)
    for piece in pieces:
        inputs, mix = change(tensors(items.batch(piece), accelerator.device))
        targets = torch.from_numpy(items.batch_targets(piece)).to(accelerator.device)
        with nullcontext() if piece is pieces[-1] else accelerator.no_sync(model):
            outputs = objective.outputs(model, inputs, targets, step)
            loss = objective.loss(outputs, targets)
            if mix is not None:
                loss = mix.share * loss + (1.0 - mix.share) * objective.loss(outputs, targets[mix.partners])
            share = weight * len(piece) / len(positions)
            penalties = [share * term(model, outputs, lambda other: change(other)[0]) for term in terms]
            # Processes average their gradients; their number undoes it.
            accelerator.backward(sum(penalties, loss) * (accelerator.num_processes / weight))
        total += loss.detach()
    return accelerator.reduce(total, "sum"), weight


def gradient_norms(accelerator: Accelerator, network: Network) -> dict[str, float]:
    """Of each block that learns, from the input to the head: gradients that vanish or explode on the way are seen."""
    inside = {id(parameter) for _, block in network.blocks() for parameter in block.parameters()}
    parts = [(name, list(block.parameters())) for name, block in network.blocks()]
    parts.append(("head", [parameter for parameter in network.parameters() if id(parameter) not in inside]))
    scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
    learning = {name: [p.grad for p in part if p.grad is not None] for name, part in parts}
    return {name: float(nn.utils.get_total_norm(part)) / scale for name, part in learning.items() if part}


def evaluation_positions(epoch_steps: int, evaluations: int) -> set[int]:
    """After how many steps of an epoch the validation split is measured: evenly spread, the last step always."""
    return {math.ceil(epoch_steps * i / evaluations) for i in range(1, evaluations + 1)}


def watch_plateau(progress: Progress, loss: float, schedule: Schedule) -> None:
    """Count a plateau when the validation loss has not fallen for the schedule's patience."""
    if progress.flat_loss is None or loss < progress.flat_loss:
        progress.flat_loss, progress.flat = loss, 0
        return
    progress.flat += 1
    if progress.flat >= schedule.patience:
        progress.flat = 0
        progress.plateaus += 1


def judge(progress: Progress, found: dict[str, float], stopping: Stopping | None, objective: Objective) -> bool:
    """Whether `found` is the best evaluation so far; sets `progress.stopped` when patience is at its end."""
    metric = stopping.metric if stopping else "loss"
    score = -found[metric] if metric == "loss" or metric in objective.falling else found[metric]
    if stopping is not None:
        if progress.reference is None or score > progress.reference + stopping.min_delta:
            progress.reference, progress.stale = score, 0
        else:
            progress.stale += 1
        progress.stopped = progress.stale >= stopping.patience
    keeps_last = objective.keeps_last and metric == "loss"
    if progress.best is not None and score <= progress.best and not keeps_last:
        return False
    progress.best, progress.best_step, progress.best_metrics = score, progress.step, found
    return True


def seed_generators(device: torch.device, seed: int, step: int, process: int) -> None:
    """Independent random numbers for every step and process (numpy's SeedSequence mixes the three).

    Only those of the devices in use: torch.manual_seed keeps a growing list of calls for each kind that is absent.
    """
    mixed = int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(mixed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(mixed)


def share_buffers(accelerator: Accelerator, network: Network) -> None:
    """Give every process the first one's running statistics, so that all evaluate the same network."""
    if accelerator.num_processes > 1:
        broadcast(list(network.buffers()))


def put_back(network: Network, tensors: dict[str, Tensor]) -> None:
    """Of the network's state, what `tensors` has; the rest stays."""
    network.load_state_dict({**network.state_dict(), **registry.whole(network, tensors)})


def resume(
    network: Network,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    folder: Path,
    run: str,
    reporter: Reporter,
) -> tuple[Progress, dict[str, Tensor]]:
    """Put back the newest checkpoint of this run, if there is one: where it stood, and its best weights."""
    found = checkpoint.load(folder, run, lambda why: reporter.event(why, level="warn"))
    if found is None:
        return Progress(run=run), {}
    put_back(network, found.weights)
    optim.load_state_tensors(optimizer, found.optimizer)
    if accelerator.scaler is not None and found.progress.scaler:
        accelerator.scaler.load_state_dict(found.progress.scaler)
    reporter.event(f"going on from the checkpoint of step {found.progress.step}")
    return found.progress, found.best
