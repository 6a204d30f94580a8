"""Random networks whose batch norms know their data, so that their features are of the order of one."""

from __future__ import annotations

import torch
from torch import nn


def settle(network: nn.Module, *inputs: torch.Tensor) -> None:
    """Give every batch norm the statistics of `inputs`.

    With random weights and statistics nobody took, a deep network's features shrink to 1e-30, and equal anything.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    network.train()
    with torch.no_grad():
        network(*inputs)
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
