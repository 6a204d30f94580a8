"""Gradient checkpointing: the same gradients, bit for bit, of far fewer tensors that are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from finetune.recomputation import recompute
from models import registry
from models.network import Network
from models.spec import Classification, LanguageModel, ModelSpec, Task, Translation
from models.transformer import Translator
from tests.models.narrow import TRANSFORMER

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
LLAMA = transformers.LlamaConfig(**SIZES, attention_dropout=0.2, max_position_embeddings=64)
GPT2 = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64)
VIT = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
    hidden_dropout_prob=0.1,
)  # fmt: skip
OURS: dict[str, Any] = {**TRANSFORMER, "layers": 4, "dropout": 0.2, "vocabulary": VOCABULARY}
NETWORKS: dict[str, tuple[str, dict[str, Any], Task]] = {
    "llama": ("causal_decoder", {"config": LLAMA.to_dict()}, LanguageModel()),
    "gpt2": ("causal_decoder", {"config": GPT2.to_dict()}, LanguageModel()),
    "bert": ("text_encoder", {"config": transformers.BertConfig(**SIZES).to_dict()}, Classification(3)),
    "vit": ("image_encoder", {"config": VIT.to_dict(), "image_size": 32}, Classification(3)),
    "encoder": ("transformer_encoder", OURS, Classification(3)),
    "decoder": ("transformer_decoder", OURS, LanguageModel()),
    "translator": ("transformer", {**OURS, "target_vocabulary": VOCABULARY}, Translation()),
}


def network_of(name: str) -> Network:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    architecture, hyperparameters, task = NETWORKS[name]
    return registry.build(ModelSpec(architecture=architecture, hyperparameters=hyperparameters, task=task)).train()


def learned(network: Network) -> tuple[dict[str, Tensor], int]:
    """The gradients of one step, and the bytes that its forward pass keeps for them."""
    random = torch.Generator().manual_seed(3)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if network.input_names == ("pixels",):
        inputs = [torch.randint(0, 256, (4, 32, 32, 3), generator=random, dtype=torch.uint8)]
    else:
        inputs = [torch.randint(5, VOCABULARY, (4, 24), generator=random), torch.ones(4, 24, dtype=torch.long)]
        inputs += inputs[:1] if isinstance(network, Translator) else []
    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(*inputs)["logits"]
    torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), torch.zeros(logits[..., 0].numel(), dtype=torch.long)
    ).backward()
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    found = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return found, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same_though_little_is_kept(name: str) -> None:
    usual, much = learned(network_of(name))
    network = network_of(name)
    recompute(network)
    again, little = learned(network)
    assert usual.keys() == again.keys() != set()
    assert [name for name in usual if not torch.equal(usual[name], again[name])] == []
    assert little < 0.6 * much


def test_a_frozen_trunk_answers_as_ever() -> None:
    network = network_of("llama")
    recompute(network)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    plain = network_of("llama").eval()
    with torch.no_grad():
        assert torch.equal(
            network.eval()(ids, torch.ones_like(ids))["logits"], plain(ids, torch.ones_like(ids))["logits"]
        )


def test_convolutions_are_not_computed_again() -> None:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
    config = transformers.ResNetConfig(**sizes).to_dict()
    spec = ModelSpec(architecture="image_encoder", hyperparameters={"config": config}, task=Classification(2))
    network = registry.build(spec)
    assert any(isinstance(module, nn.Conv2d) for module in network.modules())
    with pytest.raises(ValueError, match="gradient_checkpointing: image_encoder has no layers here"):
        recompute(network)
