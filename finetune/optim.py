"""Optimizers, their parameter groups, what is frozen, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune import rmsprop
from finetune.lora import hold_base
from finetune.recipe import AdaGrad, Adam, AdamW, Optimizer, RmsProp, Schedule, Transfer
from models.network import Network


def build(network: Network, section: Optimizer, transfer: Transfer) -> torch.optim.Optimizer:
    """The recipe's optimizer over all parameters that ever learn; without a gradient, yet frozen, they are left alone.

    AdamW: Loshchilov and Hutter 2019; Adam: Kingma and Ba 2015; AdaGrad: Duchi, Hazan and Singer 2011. The fused
    kernels update all parameters in one pass (on two CPU cores, twelve times as fast for MiniLM as one operation after
    the other).
    """
    groups = parameter_groups(network, section.weight_decay, transfer)
    if isinstance(section, AdamW | Adam):
        kind = torch.optim.AdamW if isinstance(section, AdamW) else torch.optim.Adam
        return kind(groups, lr=0.0, betas=(section.beta1, section.beta2), eps=section.epsilon, fused=True)
    if isinstance(section, AdaGrad):
        return torch.optim.Adagrad(groups, lr=0.0, eps=section.epsilon)
    if isinstance(section, RmsProp):
        return rmsprop.RmsProp(
            groups,
            decay=section.decay,
            momentum=section.momentum,
            nesterov=section.nesterov,
            epsilon=section.epsilon,
        )
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=section.momentum, nesterov=section.nesterov, fused=True)
    if section.momentum:
        # Its fused kernel cannot start the momentum of some parameters, released ones, later than that of others.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def parameter_groups(network: Network, weight_decay: float, transfer: Transfer) -> list[dict[str, Any]]:
    """One group for each block and kind of parameter that learns: `params`, their `names`, `weight_decay` and `scale`.

    `scale` is what the schedule's rate is multiplied by: layer_decay ** distance, the head at distance 0, the last
    block at 1 (Howard and Ruder 2018). Vectors (biases, the scales of norms) do not decay: pulling them to zero
    regularizes nothing.
    """
    blocks = network.blocks()
    scales = {name: transfer.layer_decay ** (len(blocks) - i) for i, (name, _) in enumerate(blocks)}
    block_of = {id(p): name for name, block in blocks for p in block.parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in learning(network, transfer).items():
        scale = scales[block_of[id(parameter)]] if id(parameter) in block_of else 1.0
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "weight_decay": decay, "scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int, plateaus: int = 0) -> float:
    """Rate of step `step` (from 0) of `steps`, after so many plateaus of the validation loss.

    Warm-up rises in a line and reaches the peak with its last step; the decay starts at the peak and would reach
    floor · peak at step `steps`, so that no step is spent at a rate of zero.
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    if schedule.decay == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif schedule.decay == "linear":
        share = 1.0 - progress
    elif schedule.decay == "step":
        share = schedule.factor ** sum(step >= milestone * steps for milestone in schedule.milestones)
    elif schedule.decay == "plateau":
        share = schedule.factor**plateaus
    else:
        share = 1.0
    return peak * (schedule.floor + (1.0 - schedule.floor) * share)


@torch.no_grad()
def shrink(optimizer: torch.optim.Optimizer, l1: float) -> None:
    """Move every weight (no vectors) that has a gradient towards zero by l1 times its rate, and no further.

    The proximal step of an L1 term (Tibshirani 1996; Daubechies et al. 2004): weights become exactly zero, which the
    term's gradient alone never makes them.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.ndim > 1 and parameter.grad is not None:
                left = parameter.abs().sub_(l1 * group["lr"]).clamp_(min=0.0)
                parameter.copy_(left.mul_(parameter.sign()))


@contextmanager
def noisy(network: Network, share: float) -> Iterator[None]:
    """Gaussian noise on the learning weights (no vectors) inside; outside they are what they were, bit for bit.

    share: the noise's deviation over that of each tensor. Murray and Edwards 1994.
    """
    if not share:
        yield
        return
    weights = [p for p in network.parameters() if p.ndim > 1 and p.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.add_(torch.randn_like(weight) * (share * weight.std()))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def frozen_blocks(network: Network, freeze: str | None, train_last: int | None = None) -> list[nn.Module]:
    """Blocks from the input up to and including the one named `freeze` ("all": every block, None: none), or all but the
    `train_last` before the head.

    Raises ValueError listing the blocks when there is none of that name, or not so many.
    """
    names = [name for name, _ in network.blocks()]
    modules = [module for _, module in network.blocks()]
    if train_last is not None:
        if train_last > len(names):
            raise ValueError(
                f"transfer.train_last: {train_last} blocks, but there are {len(names)}, from the input "
                f"{', '.join(names)}"
            )
        return modules[: len(names) - train_last]
    if freeze is None:
        return []
    if freeze == "all":
        return modules
    if freeze not in names:
        raise ValueError(f'transfer.freeze: no block {freeze!r}; from the input they are {", ".join(names)}, or "all"')
    return modules[: names.index(freeze) + 1]


def still_frozen(frozen: Sequence[nn.Module], transfer: Transfer, epoch: int) -> Sequence[nn.Module]:
    """Those of the `frozen` blocks, from the input, that are not released yet in `epoch` (Howard and Ruder 2018)."""
    if transfer.unfreeze_epoch is None or epoch < transfer.unfreeze_epoch:
        return frozen
    released = epoch - transfer.unfreeze_epoch + 1 if transfer.gradual else len(frozen)
    return frozen[: max(0, len(frozen) - released)]


def learning(network: Network, transfer: Transfer) -> dict[str, nn.Parameter]:
    """The parameters that learn at any time of a run, by name; those that are shared once. The network is left in the
    mode of its last epoch."""
    frozen = frozen_blocks(network, transfer.freeze, transfer.train_last)
    set_mode(network, frozen if transfer.unfreeze_epoch is None else [])
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def fixed(network: Network, transfer: Transfer) -> dict[str, nn.Parameter]:
    """The other ones, which stay what they are in the whole run."""
    learned = learning(network, transfer)
    return {name: parameter for name, parameter in network.named_parameters() if name not in learned}


def set_mode(network: Network, frozen: Iterable[nn.Module]) -> None:
    """Training mode and gradients for all but the `frozen` blocks, and what adapters stand beside.

    A frozen block is a fixed function: no gradients, and evaluation mode, so that the running statistics of its batch
    norms stay what they are and its dropout is off.
    """
    network.train()
    network.requires_grad_(True)
    hold_base(network)
    for block in frozen:
        block.eval()
        block.requires_grad_(False)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors "<what>:<parameter>", e.g. "exp_avg:head.weight"."""
    names = {id(p): n for group in optimizer.param_groups for p, n in zip(group["params"], group["names"], strict=True)}
    return {
        f"{key}:{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave, on each parameter's device.

    In each parameter's memory layout, too: the fused kernels walk through parameter and state in parallel.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        what, _, name = key.partition(":")
        state.setdefault(name, {})[what] = value
    for group in optimizer.param_groups:
        for parameter, name in zip(group["params"], group["names"], strict=True):
            if name in state:
                optimizer.state[parameter] = {
                    what: torch.empty_like(parameter).copy_(value).detach()
                    if value.shape == parameter.shape
                    else value.to(parameter.device, copy=True)
                    for what, value in state[name].items()
                }
