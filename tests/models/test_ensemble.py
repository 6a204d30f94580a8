"""Several networks as one: what they answer together, by hand and in the exported graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from export.onnx import export_onnx
from export.parity import check
from models import registry, votes
from models.catalog import Vote
from models.ensemble import Ensemble, ensemble
from models.network import Network
from models.spec import Binary, Classification, ModelSpec, MultiLabel, MultiTask, Regression, Task


def member(task: Task, seed: int, architecture: str = "mlp", **hyperparameters: Any) -> Network:
    torch.manual_seed(seed)
    given = hyperparameters or {"features": 4, "hidden": [8]}
    return registry.build(ModelSpec(architecture=architecture, hyperparameters=given, task=task)).eval()


def members(task: Task, count: int = 3) -> tuple[list[Network], Tensor]:
    """And a batch of their input. Their answers are far from flat."""
    found = [member(task, seed) for seed in range(count)]
    for one in found:
        for parameter in one.get_submodule("head").parameters():
            parameter.data *= 4.0
    return found, torch.randn(50, 4)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    found: np.ndarray = exponentials / exponentials.sum(-1, keepdims=True)
    return found


def answer(network: Network, *inputs: Tensor) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: value.numpy() for name, value in network.eval()(*inputs).items()}


def entropy(probabilities: np.ndarray) -> np.ndarray:
    found: np.ndarray = -(probabilities * np.log(probabilities)).sum(-1)
    return found


def test_softmax_of_the_mean_gives_the_mean_of_the_members_probabilities() -> None:
    networks, vectors = members(Classification(5))
    each = np.stack([softmax(answer(one, vectors)["logits"]) for one in networks])
    found = answer(ensemble(networks, "mean"), vectors)
    np.testing.assert_allclose(softmax(found["logits"]), each.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["uncertainty"], entropy(each.mean(0)) - entropy(each).mean(0), atol=1e-5)
    wide = np.concatenate([answer(one, vectors)["embedding"] for one in networks], axis=1)
    np.testing.assert_array_equal(found["embedding"], wide)


def test_a_majority_is_the_share_of_votes() -> None:
    networks, vectors = members(Classification(5))
    each = np.stack([answer(one, vectors)["logits"] for one in networks])
    best = np.sort(each, axis=-1)
    clear = (best[..., -1] - best[..., -2] > 0.01).all(0)
    assert clear.sum() > 40
    winners = each.argmax(-1)
    shares = np.stack([(winners == label).mean(0) for label in range(5)], axis=1)
    found = answer(ensemble(networks, "majority"), vectors)
    np.testing.assert_allclose(softmax(found["logits"])[clear], shares[clear], atol=1e-3)
    assert np.isfinite(found["logits"]).all()
    assert {1, 2} <= {round(3 * share) for share in shares.max(axis=1)}, "they agree and they do not"


def counted(*members: list[float], vote: Vote = "majority") -> tuple[list[float], float]:
    """Joint probabilities and uncertainty of members that answer these probabilities."""
    logits = torch.tensor(members, dtype=torch.float32).clamp(min=1e-30).log().unsqueeze(1)
    found = votes.joined(Classification(len(members[0])), {"logits": logits}, vote)
    return softmax(found["logits"].numpy())[0].tolist(), found["uncertainty"].item()


def test_votes_by_hand() -> None:
    # Two of three vote for the first label, one is very sure of the second: the mean and the majority differ.
    split = ([0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.0, 1.0, 0.0])
    majority, _ = counted(*split)
    assert majority == pytest.approx([2 / 3, 1 / 3, 0.0], abs=2e-4)
    mean, _ = counted(*split, vote="mean")
    assert mean == pytest.approx([0.4, 0.6, 0.0], abs=1e-6)


def test_a_tie_of_votes_is_broken_by_the_mean_and_a_member_that_cannot_decide_splits_its_vote() -> None:
    tied, _ = counted([0.6, 0.4], [0.1, 0.9])
    assert tied == pytest.approx([0.5, 0.5], abs=1e-4)
    assert tied[1] > tied[0], "the second has 0.65 of the mean"
    torn, _ = counted([0.5, 0.5, 0.0], [0.0, 0.8, 0.2])
    assert torn == pytest.approx([0.25, 0.75, 0.0], abs=2e-4)


def test_uncertainty_is_what_the_members_do_not_agree_about() -> None:
    _, opposed = counted([1.0, 0.0], [0.0, 1.0], vote="mean")
    _, doubtful = counted([0.5, 0.5], [0.5, 0.5], vote="mean")
    assert opposed == pytest.approx(np.log(2), rel=1e-5)
    assert doubtful == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("task", [Binary(), MultiLabel(3)])
def test_sigmoids_are_joined_unit_by_unit(task: Task) -> None:
    networks, vectors = members(task)
    each = np.stack([1 / (1 + np.exp(-answer(one, vectors)["logits"].astype(np.float64))) for one in networks])
    found = answer(ensemble(networks, "mean"), vectors)
    np.testing.assert_allclose(1 / (1 + np.exp(-found["logits"])), each.mean(0), atol=1e-6)
    both = np.stack([each, 1 - each], axis=-1)
    np.testing.assert_allclose(found["uncertainty"], (entropy(both.mean(0)) - entropy(both).mean(0)).sum(-1), atol=1e-5)
    majority = 1 / (1 + np.exp(-answer(ensemble(networks, "majority"), vectors)["logits"]))
    clear = (np.abs(each - 0.5) > 0.01).all(0)
    assert clear.mean() > 0.8
    np.testing.assert_allclose(majority[clear], (each > 0.5).mean(0)[clear], atol=1e-3)


def test_numbers_have_the_mean_and_the_variance_of_the_mixture() -> None:
    networks, vectors = members(Regression(2, "gaussian"))
    each = [answer(one, vectors) for one in networks]
    found = answer(ensemble(networks, "mean"), vectors)
    # Ten thousand draws from the mixture of the members' normal distributions, for the first item.
    random = np.random.default_rng(0)
    draws = np.concatenate([random.normal(one["value"][0], one["deviation"][0], (100_000, 2)) for one in each])
    np.testing.assert_allclose(found["value"][0], draws.mean(0), atol=0.02)
    np.testing.assert_allclose(found["deviation"][0], draws.std(0), rtol=0.01)
    np.testing.assert_allclose(found["uncertainty"], np.std([one["value"] for one in each], axis=0), rtol=1e-4)


def test_each_of_several_heads_is_joined_by_its_own_kind() -> None:
    task = MultiTask({"kind": Classification(3), "size": Regression(1)})
    networks, vectors = members(task)
    each = [answer(one, vectors) for one in networks]
    joint = ensemble(networks, "mean")
    found = answer(joint, vectors)
    assert set(joint.output_names) == set(found) >= {"logits_kind", "value_size", "uncertainty_size"}
    np.testing.assert_allclose(
        softmax(found["logits_kind"]), np.mean([softmax(one["logits_kind"]) for one in each], axis=0), atol=1e-6
    )
    np.testing.assert_allclose(found["value_size"], np.mean([one["value_size"] for one in each], axis=0), atol=1e-6)


@pytest.mark.parametrize("vote", ["mean", "majority"])
def test_it_comes_back_from_its_file_and_its_graph_computes_the_same(vote: Vote, tmp_path: Path) -> None:
    networks, vectors = members(Classification(5))
    joint = ensemble(networks, vote)
    registry.save(joint, tmp_path)
    again = registry.restore(tmp_path)
    assert isinstance(again, Ensemble)
    assert again.spec == joint.spec
    for name, value in answer(joint, vectors).items():
        np.testing.assert_array_equal(answer(again, vectors)[name], value)
    batch = {"vector": vectors.numpy()}
    export_onnx(again, tmp_path, batch)
    found = check(again, tmp_path, [batch])
    assert {1, 50, 53} <= set(found.batch_sizes)
    assert found.largest_difference < 1e-4


@pytest.mark.slow
def test_members_of_different_architectures_read_the_same_texts(tmp_path: Path) -> None:
    small = {"vocabulary": 50, "embedding": 6, "width": 5}
    task = Classification(3)
    networks = [
        member(task, 1, "gru", **small, bidirectional=True),
        member(task, 2, "convnet1d", **small),
        member(task, 3, "lstm", **small),
    ]
    joint = ensemble(networks, "mean")
    ids = np.random.default_rng(0).integers(4, 50, (5, 9))
    mask = np.arange(9) < np.array([9, 4, 1, 7, 9])[:, None]
    batch = {"input_ids": np.where(mask, ids, 0), "attention_mask": mask.astype(np.int64)}
    export_onnx(joint, tmp_path, batch)
    found = check(joint, tmp_path, [batch])
    assert {3, 9, 14} <= set(found.lengths)


def test_blocks_stand_together_by_their_distance_from_the_head() -> None:
    task = Classification(3)
    deep = member(task, 0, features=4, hidden=[8, 8])
    flat = member(task, 1, features=4, hidden=[8])
    joint = ensemble([deep, flat], "mean")
    assert [name for name, _ in joint.blocks()] == ["hidden.0", "hidden.1+hidden.0"]
    inside = [id(p) for _, block in joint.blocks() for p in block.parameters()]
    heads = [id(p) for one in (deep, flat) for p in one.get_submodule("head").parameters()]
    assert sorted(inside + heads) == sorted(id(p) for p in joint.parameters())
