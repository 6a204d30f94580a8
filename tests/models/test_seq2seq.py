"""Encoder and decoder: step by step as all at once, deaf to padding, attending as the formulas say."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from export import parity
from export.onnx import export_onnx
from finetune import greedy
from models import registry
from models.seq2seq import Seq2Seq
from models.spec import Classification, ModelSpec, Translation

BOS, EOS = 2, 3
KINDS = [
    {"cell": cell, "attention": attention, "layers": layers, "bidirectional": bidirectional}
    for (cell, attention), (layers, bidirectional) in zip(
        product(("gru", "lstm"), ("none", "additive")), ((1, True), (2, True), (2, False), (1, False)), strict=True
    )
]


def network(seed: int = 0, **hyperparameters: Any) -> Seq2Seq:
    torch.manual_seed(seed)
    sizes = {"vocabulary": 40, "target_vocabulary": 30, "embedding": 6, "width": 8}
    spec = ModelSpec(architecture="seq2seq", hyperparameters={**sizes, **hyperparameters}, task=Translation())
    found = registry.build(spec).eval()
    assert isinstance(found, Seq2Seq)
    for parameter in found.parameters():  # biases that are not 0, weights large enough to tell
        torch.nn.init.normal_(parameter, std=0.5)
    return found


def sources(lengths: tuple[int, ...] = (5, 3, 1), extra: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = (torch.arange(max(lengths) + extra) < torch.tensor(lengths)[:, None]).long()
    ids = torch.stack([torch.arange(mask.shape[1]) + 7 * (row + 1) for row in range(len(lengths))]) % 36 + 4
    return ids * mask, mask


def targets(rows: int = 3, tokens: int = 6) -> Tensor:
    return torch.cat([torch.full((rows, 1), BOS), torch.arange(rows * (tokens - 1)).view(rows, -1) % 26 + 4], 1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps_answer_what_teacher_forcing_answers(kind: dict[str, Any]) -> None:
    model, (ids, mask), given = network(**kind), sources(), targets()
    with torch.no_grad():
        whole = model(ids, mask, given)["logits"]
        assert whole.shape == (3, 6, 30)
        known = {"attention_mask": mask, **model.encoder(ids, mask)}
        for step in range(6):
            known["token"] = given[:, step : step + 1]
            found = model.decoder(*(known[name] for name in model.decoder.inputs))
            assert torch.allclose(found["logits"], whole[:, step], atol=1e-5), step
            known |= {name: found[f"next_{name}"] for name in model.decoder.states}
    assert not torch.allclose(whole[:, 1], whole[:, 2], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_padding_does_not_matter(kind: dict[str, Any]) -> None:
    model, (ids, mask), given = network(**kind), sources(), targets()
    wider = sources(extra=4)
    with torch.no_grad():
        assert torch.allclose(model(*wider, given)["logits"], model(ids, mask, given)["logits"], atol=1e-6)
        alone = model(ids[1:2, :3], mask[1:2, :3], given[1:2])["logits"]
        assert torch.allclose(alone, model(ids, mask, given)["logits"][1:2], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_later_tokens_have_no_say_and_the_source_has(kind: dict[str, Any]) -> None:
    model, (ids, mask), given = network(**kind), sources(), targets()
    with torch.no_grad():
        before = model(ids, mask, given)["logits"]
        other = given.clone()
        other[:, 3] = 29
        after = model(ids, mask, other)["logits"]
        assert torch.equal(before[:, :3], after[:, :3])
        assert not torch.allclose(before[:, 3], after[:, 3], atol=1e-3)
        ids[:, 0] = 39
        assert not torch.allclose(before[:, 0], model(ids, mask, given)["logits"][:, 0], atol=1e-3)


def test_additive_attention_is_what_the_formulas_say() -> None:
    attention = network(attention="additive").decoder.attention
    assert attention is not None
    torch.manual_seed(2)
    state, keys, memory = torch.randn(2, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        context, weights = attention(state, keys, memory, mask)
    w, b = attention.query.weight.detach().numpy(), attention.query.bias.detach().numpy()
    v = attention.score.weight.detach().numpy()[0]
    for row, length in ((0, 4), (1, 2)):
        scores = [v @ np.tanh(w @ state[row].numpy() + b + keys[row, j].numpy()) for j in range(length)]
        shares = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(weights[row, :length], shares, rtol=1e-5)
        assert not weights[row, length:].any()
        expected = sum(share * memory[row, j].numpy() for j, share in enumerate(shares))
        np.testing.assert_allclose(context[row], expected, rtol=1e-4, atol=1e-6)


def test_without_attention_there_is_one_context_and_with_it_one_a_token() -> None:
    ids, mask = sources()
    with torch.no_grad():
        plain, attending = (network(attention=kind).encoder(ids, mask) for kind in ("none", "additive"))
    assert {name: list(value.shape) for name, value in plain.items()} == {"memory": [3, 16], "hidden": [3, 1, 8]}
    assert {name: list(value.shape) for name, value in attending.items()} == {
        "memory": [3, 5, 16],
        "keys": [3, 5, 8],
        "hidden": [3, 1, 8],
    }


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_graphs_compute_the_same_at_any_batch_and_length(kind: dict[str, Any], tmp_path: Path) -> None:
    model = network(**kind)
    batches = [
        {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        for ids, mask in (sources((7, 5, 4, 2)), sources((11, 3)), sources((1,)))
    ]
    described = export_onnx(model, tmp_path, batches[0])
    assert set(described) == {"model", "decoder"}
    inputs = {tensor.name: tensor.shape for tensor in described["decoder"].inputs}
    assert inputs["token"] == ["batch", 1]
    if kind["attention"] == "additive":
        assert inputs["memory"][:2] == ["batch", "sequence"]
    found = parity.check(model, tmp_path, batches)
    assert found.batch_sizes == [1, 2, 4, 7]
    assert {1, 3, 7, 11, 12} <= set(found.lengths)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_greedy_decoding_takes_the_likeliest_token_until_the_end(kind: dict[str, Any]) -> None:
    model, (ids, mask) = network(seed=1, **kind), sources()
    with torch.no_grad():
        model.decoder.vocabulary.bias[EOS] += 1.5  # an end that comes in time
    written = greedy.translate(model, ids, mask, begin=BOS, end=EOS, max_tokens=9)
    for row in range(3):
        tokens = [BOS]
        with torch.no_grad():
            while len(tokens) <= 9 and tokens[-1] != EOS:
                logits = model(ids[row : row + 1], mask[row : row + 1], torch.tensor([tokens]))["logits"]
                tokens.append(int(logits[0, -1].argmax()))
        assert written[row] == [token for token in tokens[1:] if token != EOS]
    assert len({len(row) for row in written}) > 1, "the rows end at different steps"


def test_what_cannot_be_built_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="seq2seq has no way to do the task classification"):
        registry.build(ModelSpec(architecture="seq2seq", task=Classification(2)))
    with pytest.raises(ValueError, match="`vocabulary` and `target_vocabulary` are open"):
        registry.build(ModelSpec(architecture="seq2seq", task=Translation()))
