"""Gradient checkpointing: memory for time (Chen et al. 2016)."""

from __future__ import annotations

from transformers import PreTrainedModel

from models.network import Network
from models.transformer_layers import Layers


def recompute(network: Network) -> None:
    """From now on, while it learns, each layer keeps what goes into it, and computes the rest again for the gradients.

    Dropout draws the same numbers again. Raises ValueError when the network is not made of such layers.
    """
    found = False
    for module in network.modules():
        if isinstance(module, Layers):
            module.recomputes = found = True
        elif isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
            module.activation_checkpointing_enable({"use_reentrant": False})
            found = True
    if not found:
        raise ValueError(
            f"gradient_checkpointing: {network.spec.architecture} has no layers here that can be computed again; lower "
            "batch_size instead (gradient_accumulation keeps the step as large)"
        )
