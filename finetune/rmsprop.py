"""RMSProp with classical or Nesterov momentum, which torch's own does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class RmsProp(Optimizer):
    """r ← ρ r + (1 - ρ) g²,  u = g / (√r + ε),  v ← α v + u,  θ ← θ - lr · v (Tieleman and Hinton 2012).

    Nesterov's momentum looks ahead: θ ← θ - lr · (u + α v) (Sutskever et al. 2013, written for the point ahead, as in
    torch.optim.SGD). weight_decay: of each group, L2, added to the gradient.
    """

    def __init__(
        self, params: Iterable[Any], *, decay: float, momentum: float, nesterov: bool, epsilon: float, lr: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self.decay, self.momentum, self.nesterov, self.epsilon = decay, momentum, nesterov, epsilon

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Takes no closure."""
        assert closure is None, "the loss is computed before the step"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["weight_decay"]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                state = self.state[parameter]
                if "square" not in state:
                    state["square"] = torch.zeros_like(parameter)
                    if self.momentum:
                        state["velocity"] = torch.zeros_like(parameter)
                state["square"].mul_(self.decay).addcmul_(gradient, gradient, value=1.0 - self.decay)
                update = gradient / state["square"].sqrt().add_(self.epsilon)
                if self.momentum:
                    velocity = state["velocity"].mul_(self.momentum).add_(update)
                    update = update.add_(velocity, alpha=self.momentum) if self.nesterov else velocity
                parameter.add_(update, alpha=-group["lr"])
