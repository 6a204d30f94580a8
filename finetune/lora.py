"""Low-rank adapters (Hu et al. 2022), by peft: put into a network, learned, and merged into its weights in the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import peft
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.recipe import Lora
from models.network import Network

ADAPTER = "default"
LINEAR = (nn.Linear, Conv1D)
MOST_NAMES = 12


def adapt(network: Network, section: Lora, frozen: Iterable[nn.Module], base: str) -> None:
    """Put an adapter that changes nothing yet beside the linear layers of the trunk, in place.

    frozen: blocks that get none. base: what the network begins with, for the adapter's own file. Random numbers are
    taken from the generator in use. Raises ValueError when there are no such layers.
    """
    root = adapted(network)
    held = {id(module) for block in frozen for module in block.modules()}
    linear = {name: module for name, module in linear_layers(network, root).items() if id(module) not in held}
    if section.targets == "all-linear":
        chosen = list(linear)
    else:
        chosen = [name for name in linear if any(f".{name}".endswith(f".{end}") for end in section.targets)]
        for end in section.targets:
            if not any(f".{name}".endswith(f".{end}") for name in linear):
                raise ValueError(f"transfer.lora.targets: no linear layer {end!r}; {in_words(linear)}")
    if not chosen:
        raise ValueError(f"transfer.lora: {network.spec.architecture} has no linear layer that could be adapted")
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        target_modules=chosen,
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in chosen),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM" if answering(root) is not None else None,
    )
    peft.inject_adapter_in_model(config, root, ADAPTER)


def adapted(network: Network) -> nn.Module:
    """What the adapter's names are relative to: the model of transformers inside, else the network."""
    return next((module for module in network.modules() if isinstance(module, PreTrainedModel)), network)


def linear_layers(network: Network, root: nn.Module) -> dict[str, nn.Module]:
    """Of the blocks, by their names in `root`, without the layer that answers by the token."""
    inside = {id(module) for _, block in network.blocks() for module in block.modules()}
    return {
        name: module
        for name, module in root.named_modules()
        if isinstance(module, LINEAR) and id(module) in inside and module is not answering(root)
    }


def answering(root: nn.Module) -> nn.Module | None:
    """The layer of a language model of transformers that makes logits; None in any other model."""
    return root.get_output_embeddings() if isinstance(root, PreTrainedModel) else None


def in_words(layers: Iterable[str]) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    more = f" and {len(ends) - MOST_NAMES} more" if len(ends) > MOST_NAMES else ""
    return f"there are {', '.join(ends[:MOST_NAMES])}{more}"


def hold_base(network: Network) -> None:
    """No gradients for what stands beside the adapters, and no new statistics for its batch norms. Nothing happens to
    a network without adapters."""
    if not any(isinstance(module, LoraLayer) for module in network.modules()):
        return
    for _, block in network.blocks():
        for name, parameter in block.named_parameters():
            parameter.requires_grad_("lora_" in name)
        for module in block.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@contextmanager
def adapters_off(network: Network) -> Iterator[None]:
    """Inside, it computes what it computed before `adapt`."""
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge(network: Network) -> dict[str, bytes]:
    """Add all adapters to the weights, in place: the network is built as it was before `adapt`, and computes what it
    computed with them.

    Returns each adapter as the two files that peft's PeftModel.from_pretrained loads onto the base, "adapter/...", or
    "member-01-adapter/..." of the networks of an ensemble. None are there where there are no adapters.
    """
    roots = [module for module in network.modules() if "peft_config" in vars(module)]
    files = {}
    for number, root in enumerate(roots, 1):
        folder = "adapter" if len(roots) == 1 else f"member-{number:02d}-adapter"
        files.update({f"{folder}/{name}": content for name, content in adapter_files(root).items()})
        for name, layer in list(root.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                parent, _, attribute = name.rpartition(".")
                setattr(root.get_submodule(parent), attribute, layer.get_base_layer())
        del root.peft_config
    return files


def adapter_files(root: nn.Module) -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors, their names as peft has them for a model of its own."""
    state = peft.get_peft_model_state_dict(root, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in sorted(state.items())}
    config: peft.LoraConfig = root.peft_config[ADAPTER]  # type: ignore[index]
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    settings["inference_mode"] = True
    return {
        "adapter_config.json": json.dumps(settings, indent=2, sort_keys=True).encode(),
        "adapter_model.safetensors": save(tensors, {"format": "pt"}),
    }
