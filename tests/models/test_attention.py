"""Attention is torch's, given the same weights; what is masked changes nothing; a decoder's steps are its whole."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.onnx import export_onnx
from export.parity import check
from models import registry
from models.attention import Attention, attend, causal_mask, padding_mask, places, sinusoids
from models.network import Network
from models.spec import Classification, LanguageModel, MaskedLanguageModel, ModelSpec, Task
from models.transformer_decoder import CausalNetwork
from models.transformer_encoder import TextTrunk
from models.transformer_layers import Layer
from tests.models.narrow import TRANSFORMER

KINDS: list[tuple[str, Task]] = [
    ("transformer_encoder", Classification(3)),
    ("transformer_encoder", MaskedLanguageModel()),
    ("transformer_decoder", LanguageModel()),
]


def network_of(architecture: str, task: Task) -> Network:
    torch.manual_seed(0)
    hyperparameters = {"vocabulary": 261, **TRANSFORMER}
    return registry.build(ModelSpec(architecture=architecture, hyperparameters=hyperparameters, task=task)).eval()


def decoder() -> CausalNetwork:
    network = network_of("transformer_decoder", LanguageModel())
    assert isinstance(network, CausalNetwork)
    return network


def texts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens, the first row full, noise behind the ends of the others."""
    random = torch.Generator().manual_seed(length)
    lengths = torch.randint(1, length + 1, (batch,), generator=random)
    lengths[0] = length
    return torch.randint(5, 261, (batch, length), generator=random), (torch.arange(length) < lengths[:, None]).long()


def shared_with_torch(attention: Attention) -> nn.MultiheadAttention:
    """Torch's own, with the same weights."""
    theirs = nn.MultiheadAttention(attention.query.in_features, attention.heads, batch_first=True)
    parts = (attention.query, attention.key, attention.value)
    theirs.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
    theirs.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
    theirs.out_proj.load_state_dict(attention.out.state_dict())
    return theirs


def test_a_query_attends_by_the_softmax_of_scaled_products() -> None:
    queries, keys = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, 5.0]])
    values = torch.tensor([[10.0], [20.0], [30.0]])
    found, weights = attend(queries, keys, values, torch.tensor([[True, True, False]]))
    first = math.exp(2.0 / math.sqrt(2.0)) / (math.exp(2.0 / math.sqrt(2.0)) + 1.0)
    assert weights[0].tolist() == pytest.approx([first, 1.0 - first, 0.0])
    assert weights[0, 2].item() == 0.0
    assert found.item() == pytest.approx(10.0 * first + 20.0 * (1.0 - first))


def test_heads_are_those_of_torch_given_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = Attention(12, 3)
    for parameter in ours.parameters():  # zero biases would hide one that is left out
        nn.init.normal_(parameter, std=0.5)
    theirs = shared_with_torch(ours)
    x, memory = torch.randn(4, 5, 12), torch.randn(4, 7, 12)
    _, mask = texts(4, 7)
    found, weights = ours(x, *ours.read(memory), padding_mask(mask))
    expected, shares = theirs(x, memory, memory, key_padding_mask=~mask.bool(), average_attn_weights=False)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights, shares)

    found, weights = ours(x, *ours.read(x), causal_mask(5, 5, x.device))
    later = nn.Transformer.generate_square_subsequent_mask(5)
    expected, shares = theirs(x, x, x, attn_mask=later, average_attn_weights=False)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights, shares)


def test_a_layer_is_that_of_torch_given_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = Layer(12, 3, 20, 0.0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs = nn.TransformerEncoderLayer(12, 3, 20, 0.0, activation="gelu", batch_first=True, norm_first=True)
    theirs.self_attn = shared_with_torch(ours.itself.attention)
    theirs.norm1.load_state_dict(ours.itself.norm.state_dict())
    theirs.norm2.load_state_dict(ours.feed.norm.state_dict())
    theirs.linear1.load_state_dict(ours.feed.widen.state_dict())
    theirs.linear2.load_state_dict(ours.feed.narrow.state_dict())
    x, (_, mask) = torch.randn(4, 6, 12), texts(4, 6)
    found = ours(x, padding_mask(mask))
    real = mask.bool()
    torch.testing.assert_close(found[real], theirs.train()(x, src_key_padding_mask=~real)[real])


def test_places_have_the_sinusoids_of_the_paper() -> None:
    found = sinusoids(torch.arange(9), 6)
    for place in (0, 1, 8):
        for i in range(3):
            angle = place / 10_000 ** (2 * i / 6)
            assert found[place, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert found[place, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert sinusoids(torch.arange(9), 5).shape == (9, 5)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    assert places(mask)[0, 2:].tolist() == places(mask)[1, :2].tolist() == [0, 1]


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads: 5 do not divide the width, 12"):
        Attention(12, 5)
    with pytest.raises(ValueError, match="`vocabulary` is open"):
        registry.build(ModelSpec(architecture="transformer_decoder", task=LanguageModel()))
    with pytest.raises(ValueError, match="has no way to do the task classification"):
        network_of("transformer_decoder", Classification(2))


@pytest.mark.parametrize(("architecture", "task"), KINDS)
def test_padding_is_not_seen(architecture: str, task: Task) -> None:
    network = network_of(architecture, task)
    ids, mask = texts(5, 9)
    other = ids.where(mask.bool(), (ids + 7) % 261)
    name = "embedding" if isinstance(task, MaskedLanguageModel) else "logits"
    found, changed = network(ids, mask)[name], network(other, mask)[name]
    longer = network(nn.functional.pad(ids, (0, 4), value=99), nn.functional.pad(mask, (0, 4)))[name]
    if architecture == "transformer_decoder":
        found, changed, longer = found[mask.bool()], changed[mask.bool()], longer[:, :9][mask.bool()]
    assert torch.equal(found, changed)
    torch.testing.assert_close(found, longer)


def test_the_future_is_not_seen_and_the_past_is() -> None:
    network = decoder()
    ids, _ = texts(1, 8)
    logits = network(ids, torch.ones_like(ids))["logits"][0]
    for place in range(8):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % 261
        differences = (network(changed, torch.ones_like(ids))["logits"][0] - logits).abs().amax(1)
        assert not differences[:place].any()
        assert differences[place:].min() > 1e-5


def test_an_encoder_sees_both_ways_and_in_order() -> None:
    trunk = network_of("transformer_encoder", Classification(3)).get_submodule("trunk")
    assert isinstance(trunk, TextTrunk)
    ids, _ = texts(1, 6)
    ones = torch.ones_like(ids)
    states = trunk.states(ids, ones)[0]
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 261
    assert (trunk.states(changed, ones)[0] - states).abs().amax(1).min() > 1e-5
    assert (trunk(ids.flip(1), ones) - trunk(ids, ones)).abs().max() > 1e-3
    torch.testing.assert_close(trunk(ids, ones)[0], states.mean(0))


def test_only_what_is_asked_is_answered_and_as_in_the_whole() -> None:
    ids, mask = texts(4, 7)
    asked = mask.bool() & (torch.arange(7) % 2 == 0)
    network = decoder()
    torch.testing.assert_close(network(ids, mask, asked)["logits"], network(ids, mask)["logits"][asked])
    masked = network_of("transformer_encoder", MaskedLanguageModel())
    alone = torch.cat(
        [masked(ids[:, :], mask, asked & (torch.arange(4) == row)[:, None])["logits"] for row in range(4)]
    )
    assert alone.shape == (int(asked.sum()), 261)
    torch.testing.assert_close(masked(ids, mask, asked)["logits"], alone)


@pytest.mark.parametrize(("architecture", "task"), KINDS)
def test_every_parameter_is_in_one_block_or_the_head_and_learns(architecture: str, task: Task) -> None:
    network = network_of(architecture, task).train()
    ids, mask = texts(4, 7)
    answers = network(ids, mask) if task == Classification(3) else network(ids, mask, mask.bool())
    answers["logits"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert [name for name, _ in network.blocks()] == ["tokens", "layer0", "layer1"]
    inside = [id(parameter) for _, block in network.blocks() for parameter in block.parameters()]
    outside = [id(p) for name, p in network.named_parameters() if name.startswith("head.")]
    assert sorted(inside + outside) == sorted(map(id, network.parameters()))


@pytest.mark.parametrize(("architecture", "task"), [KINDS[0], pytest.param(*KINDS[1], marks=pytest.mark.slow)])
def test_the_graph_computes_the_same_at_any_batch_and_length(architecture: str, task: Task, tmp_path: Path) -> None:
    network = network_of(architecture, task)
    batches: list[dict[str, np.ndarray]] = [
        dict(zip(network.input_names, (part.numpy() for part in texts(*shape)), strict=True))
        for shape in ((3, 7), (5, 16), (2, 1))
    ]
    export_onnx(network, tmp_path, batches[0])
    parity = check(network, tmp_path, batches)
    assert {1, 3, 5} <= set(parity.batch_sizes)
    assert {1, 3, 7, 12, 16} <= set(parity.lengths)
