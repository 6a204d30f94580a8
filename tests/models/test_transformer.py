"""The encoder-decoder: its steps are its whole, and it sees of the source all and only what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.onnx import export_onnx
from export.parity import check
from models import registry
from models.spec import Classification, ModelSpec, Translation
from models.transformer import Read, Translator, Write
from tests.models.narrow import TRANSFORMER
from tests.models.test_attention import texts

TARGETS = 70


def translator() -> Translator:
    torch.manual_seed(0)
    hyperparameters = {"vocabulary": 261, "target_vocabulary": TARGETS, **TRANSFORMER}
    network = registry.build(ModelSpec(architecture="transformer", hyperparameters=hyperparameters, task=Translation()))
    assert isinstance(network, Translator)
    return network.eval()


def written(batch: int, length: int) -> Tensor:
    return torch.randint(5, TARGETS, (batch, length), generator=torch.Generator().manual_seed(1))


def test_steps_give_the_logits_of_the_whole_and_attend_to_what_is_there() -> None:
    network = translator()
    (ids, mask), targets = texts(4, 9), written(4, 6)
    whole = network(ids, mask, targets)["logits"]
    memory = Read(network)(ids, mask)
    nothing = memory["memory_keys0"][:, :, :0]
    past = dict.fromkeys(network.names("past"), nothing)
    step = Write(network)
    for place in range(6):
        answer = step(targets[:, place : place + 1], mask, *memory.values(), *past.values())
        torch.testing.assert_close(answer["logits"], whole[:, place])
        torch.testing.assert_close(answer["attention"].sum(1), torch.ones(4))
        assert not answer["attention"][mask == 0].any()
        past = {name: answer[f"next_{name}"] for name in past}
        assert past["past_keys0"].shape[2] == place + 1


def test_a_step_repeats_no_work_on_the_source() -> None:
    """The encoder, and the keys and values of the source, are not called by a step."""
    network = translator()
    ids, mask = texts(2, 5)
    example = network.graphs()["decoder"].examples({"input_ids": ids, "attention_mask": mask})[0]
    called: list[str] = []
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    Write(network)(*(example[name] for name in network.graphs()["decoder"].inputs))
    assert "decoder.layers.1.cross.attention.query" in called
    assert "decoder.layers.1.cross.attention.key" not in called
    assert not any(name.startswith(("encoder", "source")) for name in called)


def test_padding_of_the_source_and_later_tokens_are_not_seen() -> None:
    network = translator()
    (ids, mask), targets = texts(4, 9), written(4, 6)
    logits = network(ids, mask, targets)["logits"]
    other = ids.where(mask.bool(), (ids + 7) % 261)
    assert torch.equal(network(other, mask, targets)["logits"], logits)
    for place in range(6):
        changed = targets.clone()
        changed[:, place] = (targets[:, place] + 1) % TARGETS
        differences = (network(ids, mask, changed)["logits"] - logits).abs().amax(2)
        assert not differences[:, :place].any()
        assert differences[:, place:].min() > 1e-5
    for place in range(9):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % 261
        assert (network(changed, mask, targets)["logits"] - logits)[0].abs().amax(1).min() > 1e-6


def test_a_layer_of_the_decoder_is_that_of_torch_given_the_same_weights() -> None:
    network = translator()
    ours = network.decoder.layers[0]
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs = nn.TransformerDecoderLayer(16, 2, 64, 0.0, activation="gelu", batch_first=True, norm_first=True)
    for mine, other in ((ours.itself, theirs.self_attn), (ours.cross, theirs.multihead_attn)):
        parts = (mine.attention.query, mine.attention.key, mine.attention.value)
        other.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
        other.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
        other.out_proj.load_state_dict(mine.attention.out.state_dict())
    for mine, other in (
        (ours.itself.norm, theirs.norm1),
        (ours.cross.norm, theirs.norm2),
        (ours.feed.norm, theirs.norm3),
        (ours.feed.widen, theirs.linear1),
        (ours.feed.narrow, theirs.linear2),
    ):
        other.load_state_dict(mine.state_dict())
    x, memory, (_, mask) = torch.randn(3, 4, 16), torch.randn(3, 7, 16), texts(3, 7)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    found, _, _ = ours(x, seen, ours.cross.attention.read(memory), mask.bool()[:, None, None], None)
    expected = theirs(x, memory, tgt_mask=~seen, memory_key_padding_mask=~mask.bool())
    torch.testing.assert_close(found, expected)


def test_every_parameter_is_in_one_block_and_learns() -> None:
    network = translator().train()
    (ids, mask), targets = texts(4, 9), written(4, 6)
    network(ids, mask, targets)["logits"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    names = [name for name, _ in network.blocks()]
    assert names == ["source", "encoder0", "encoder1", "target", "decoder0", "decoder1"]
    inside = [id(parameter) for _, block in network.blocks() for parameter in block.parameters()]
    assert sorted(inside) == sorted(map(id, network.parameters()))


def test_the_graphs_compute_the_same_at_any_batch_and_length(tmp_path: Path) -> None:
    network = translator()
    batches = [
        dict(zip(network.input_names, (part.numpy() for part in texts(*shape)), strict=True))
        for shape in ((3, 7), (5, 16), (2, 1))
    ]
    graphs = export_onnx(network, tmp_path, batches[0])
    parity = check(network, tmp_path, batches)
    assert {1, 3, 5} <= set(parity.batch_sizes)
    assert {1, 3, 7, 12, 16} <= set(parity.lengths)
    shapes = {tensor.name: tensor.shape for tensor in graphs["decoder"].inputs}
    assert shapes["past_values1"] == ["batch", 2, "steps", 8], "nothing along one, at first"
    assert shapes["memory_values1"] == ["batch", 2, "sequence", 8]


def test_what_it_does_not_do_is_refused() -> None:
    with pytest.raises(ValueError, match="`target_vocabulary` is open"):
        registry.build(ModelSpec(architecture="transformer", hyperparameters={"vocabulary": 261}, task=Translation()))
    with pytest.raises(ValueError, match="has no way to do the task classification"):
        registry.build(ModelSpec(architecture="transformer", task=Classification(2)))
