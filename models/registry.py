"""From a ModelSpec to a network, and a network on disk: a ModelSpec as JSON and a safetensors file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import catalog
from models.network import Network
from models.spec import ModelSpec

SPEC = "model.json"
WEIGHTS = "weights.safetensors"


def build(spec: ModelSpec) -> Network:
    """The network with random initial weights. Raises ValueError when the spec is wrong or not complete."""
    catalog.hyperparameters(spec)
    module, _, function = catalog.ARCHITECTURES[spec.architecture].builder.partition(":")
    return cast(Network, getattr(importlib.import_module(module), function)(spec))


def save(network: Network, folder: Path) -> None:
    """Write model.json and weights.safetensors into an existing folder."""
    (folder / SPEC).write_bytes(msgspec.json.format(msgspec.json.encode(network.spec)))
    save_file({name: tensor.contiguous() for name, tensor in tensors(network).items()}, folder / WEIGHTS)


def restore(folder: Path) -> Network:
    """The network that `save` wrote. Raises ValueError naming what is damaged or does not fit, OSError naming a file
    that is not there."""
    spec = msgspec.json.decode((folder / SPEC).read_bytes(), type=ModelSpec)
    network = build(spec)
    try:
        network.load_state_dict(whole(network, load_file(folder / WEIGHTS)))
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {folder / SPEC}: {error}") from error
    return network


def tensors(network: Network) -> dict[str, Tensor]:
    """The state of a network, a tensor that has several names by the first of them only: a file holds it once."""
    again = _tied(network)
    return {name: tensor for name, tensor in network.state_dict().items() if name not in again}


def whole(network: Network, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `tensors` left of a state, by all the names that the network has for it."""
    return {**kept, **{name: kept[first] for name, first in _tied(network).items() if first in kept}}


def _tied(network: Network) -> dict[str, str]:
    """Names of tensors that have an earlier one, and that."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in network.state_dict(keep_vars=True).items()}
    return {name: other for name, other in names.items() if name != other}
