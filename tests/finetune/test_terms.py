"""Loss terms: what they are by hand, and that they change what is learned and not what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from export.bundle import read_manifest
from finetune import command, recipe, terms
from finetune.automatic import Chosen
from finetune.evaluate import evaluate
from finetune.objectives.cross_entropy import CrossEntropy
from finetune.preprocess import Items
from finetune.recipe import Data, Hyperparameters
from finetune.run import Cancelled, JobFailed, run
from models.spec import Binary, Classification, Embedding, MultiTask, Regression
from tests.finetune import small
from tests.finetune.small import Recorder
from tests.finetune.test_run import file, request, tensors

CHOSEN = Chosen(epochs=4, batch_size=32, learning_rate=0.01)


def same(inputs: list[Tensor]) -> list[Tensor]:
    return inputs


def leaf(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def value(term: terms.Term, **outputs: Tensor) -> Tensor:
    return term(nn.Identity(), outputs, same)


def test_confidence_is_the_negative_entropy_of_the_answer() -> None:
    term = terms.build(recipe.ConfidencePenalty(weight=0.5), Classification(3), {})
    sure, even = torch.tensor([[100.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert float(value(term, logits=sure)) == pytest.approx(0.0, abs=1e-6)
    assert float(value(term, logits=even)) == pytest.approx(-0.5 * np.log(3), rel=1e-6)
    logits = leaf([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    (found,) = torch.autograd.grad(value(term, logits=logits), logits)
    x = logits.detach().double().numpy()
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.numpy(), 0.5 * p * (np.log(p) + entropy) / 2, rtol=1e-4)


def test_confidence_of_sigmoids_and_of_several_heads() -> None:
    x = np.array([[-3.0], [0.5]])
    p = 1 / (1 + np.exp(-x))
    expected = float((p * np.log(p) + (1 - p) * np.log(1 - p)).mean())
    alone = value(terms.build(recipe.ConfidencePenalty(weight=1.0), Binary(), {}), logits=torch.tensor(x))
    assert float(alone) == pytest.approx(expected, rel=1e-5)
    far = value(terms.build(recipe.ConfidencePenalty(weight=1.0), Binary(), {}), logits=torch.tensor([[-500.0]]))
    assert float(far) == 0.0
    heads = MultiTask({"side": Binary(), "size": Regression(1), "kind": Classification(2)})
    both = value(
        terms.build(recipe.ConfidencePenalty(weight=1.0), heads, {}),
        logits_side=torch.tensor(x),
        value_size=torch.zeros(2, 1),
        logits_kind=torch.zeros(2, 2),
    )
    assert float(both) == pytest.approx(expected - np.log(2), rel=1e-5)
    with pytest.raises(ValueError, match="confidence is for answers of classes or labels"):
        terms.build(recipe.ConfidencePenalty(), Regression(2), {})


@pytest.mark.parametrize("norm", [1, 2])
def test_features_cost_their_size(norm: Any) -> None:
    embedding = leaf([[1.0, -2.0], [0.0, 3.0]])
    term = terms.build(recipe.FeaturePenalty(weight=0.1, norm=norm), Embedding(), {})
    (found,) = torch.autograd.grad(value(term, embedding=embedding), embedding)
    expected = np.sign([[1, -2], [0, 3]]) if norm == 1 else 2 * np.array([[1.0, -2], [0, 3]])
    np.testing.assert_allclose(found.numpy(), 0.1 * expected / 4, rtol=1e-6)
    with pytest.raises(ValueError, match="no layer before the head"):
        value(term, logits=torch.zeros(1, 2))


def test_coral_is_the_distance_of_the_covariances() -> None:
    random = np.random.default_rng(0)
    source = random.normal(size=(50, 3)) @ random.normal(size=(3, 3))
    target = random.normal(size=(20, 3)) + 7.0
    given = leaf(source)
    loss = terms.coral(given, torch.tensor(target, dtype=torch.float32))
    difference = np.cov(source.T) - np.cov(target.T)
    assert float(loss.detach()) == pytest.approx((difference**2).sum() / 36, rel=1e-4)
    (found,) = torch.autograd.grad(loss, given)
    expected = 4 * (source - source.mean(axis=0)) @ difference / 49 / 36
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-6)
    moved = torch.tensor(source + 5.0, dtype=torch.float32)
    assert float(terms.coral(given, moved).detach()) == pytest.approx(0.0, abs=1e-6), "a shift is no covariance"
    assert float(terms.coral(given[:1], moved).detach()) == 0.0


def noisy(items: int = 300) -> Items:
    """Other digits, from a worse scanner."""
    digits = load_digits()
    grain = np.random.default_rng(0).normal(size=(items, 64))
    vectors = (digits.data[-items:] / 16.0 + 0.5 * grain).astype(np.float32)
    targets = digits.target[-items:].astype(np.int64)
    return Items(targets, None, np.arange(items), lambda rows: {"vector": vectors[rows]})


def fitted(folder: Path, *added: terms.Term, **fields: Any) -> tuple[Any, Any]:
    network = small.mlp()
    result = small.fit(network, small.digit_vectors(), folder, chosen=CHOSEN, terms=added, **fields)
    return network, result


def embeddings(network: nn.Module, items: Items) -> Tensor:
    with torch.no_grad():
        return network(torch.from_numpy(items.batch(np.arange(len(items)))["vector"]))["embedding"]  # type: ignore[no-any-return]


def test_coral_brings_the_features_of_two_domains_together(tmp_path: Path) -> None:
    source, target = small.digit_vectors(), noisy()
    term = terms.build(recipe.Coral(file="noisy", weight=100.0), Classification(10), {"noisy": target})
    chosen = Chosen(epochs=12, batch_size=64, learning_rate=0.01)
    apart = []
    for name, added in (("plain", []), ("adapted", [term])):
        network = small.mlp(hidden=(32,))
        result = small.fit(network, source, tmp_path / name, chosen=chosen, terms=added)
        assert result.best_metrics["accuracy"] > 0.8
        one, other = terms.covariance(embeddings(network, source)), terms.covariance(embeddings(network, target))
        apart.append(float((one - other).norm() / one.norm()))  # relative to what the features vary at all
    assert apart[1] < 0.7 * apart[0]


def test_a_term_is_learned_by_and_not_measured(tmp_path: Path) -> None:
    term = terms.build(recipe.FeaturePenalty(weight=100.0, norm=2), Classification(10), {})
    plain, _ = fitted(tmp_path / "plain")
    flat, result = fitted(tmp_path / "flat", term)
    items = small.digit_vectors()
    assert embeddings(flat, items).abs().mean() < 0.2 * embeddings(plain, items).abs().mean()
    held_out = items.select(np.arange(350, 400))
    measured = evaluate(flat, held_out, CrossEntropy(10), 100, lambda: None).loss
    assert result.best_metrics["loss"] == pytest.approx(measured, rel=1e-4)
    assert result.curve[0]["train_loss"] < 3.0, "of the objective alone"


def test_pieces_of_a_step_add_up_to_the_same_terms(tmp_path: Path) -> None:
    term = terms.build(recipe.FeaturePenalty(weight=1.0), Classification(10), {})
    whole, _ = fitted(tmp_path / "whole", term)
    network = small.mlp()
    few = Chosen(epochs=4, batch_size=8, learning_rate=0.01)
    small.fit(network, small.digit_vectors(), tmp_path / "pieces", chosen=few, terms=[term], gradient_accumulation=4)
    for name, one in whole.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], one, rtol=1e-3, atol=1e-4)


def adapting(folder: Path, name: str, **fields: Any) -> Any:
    """Digits in ink, to be answered in pencil: the columns of the second file stand in another order."""
    digits = load_digits()
    names = [f"p{i}" for i in range(64)]
    rows = [
        ",".join(map(str, row)) + f",{t}" for row, t in zip(digits.data[:300].astype(int), digits.target, strict=False)
    ]
    (folder / "ink.csv").write_text("\n".join([",".join([*names, "label"]), *rows]))
    rows = [",".join(map(str, [f"{0.4 * x:.1f}" for x in row[::-1]])) for row in digits.data[-200:]]
    (folder / "pencil.csv").write_text("\n".join([",".join(names[::-1]), *rows]))
    pencil = file(folder / "pencil.csv")
    job = request(
        folder,
        file(folder / "ink.csv"),
        name=name,
        terms=(recipe.Coral(file="pencil", weight=5.0), recipe.ConfidencePenalty(weight=0.05)),
        data=Data(validation=0.2),
        hyperparameters=Hyperparameters(n_epochs=2, batch_size=32, learning_rate=0.01),
        checkpoint_seconds=0.0,
        **fields,
    )
    return msgspec.structs.replace(job, unlabelled={"pencil": pencil})


def test_a_run_that_adapts_goes_on_after_a_kill_with_the_same_weights(tmp_path: Path) -> None:
    whole = run(adapting(tmp_path, "whole"), Recorder())
    assert whole.lineage.unlabelled_sha256 == [file(tmp_path / "pencil.csv").sha256]
    assert whole.metrics["accuracy"] > 0.6
    assert "unlabelled data of the domain" in (tmp_path / "repository/whole/1/MODEL_CARD.md").read_text()
    with pytest.raises(Cancelled):
        run(adapting(tmp_path, "parts"), Recorder(20))
    assert list((tmp_path / "run-parts-job-1" / "checkpoints").glob("step-*"))
    ours, theirs = tensors(tmp_path, run(adapting(tmp_path, "parts"), Recorder())), tensors(tmp_path, whole)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_data_of_another_kind_cannot_be_adapted_to(tmp_path: Path) -> None:
    job = adapting(tmp_path, "wrong")
    (tmp_path / "texts.csv").write_text("text\n" + "".join(f"note {i}\n" for i in range(20)))
    with pytest.raises(JobFailed, match=r"texts\.csv holds text, the training file table"):
        run(msgspec.structs.replace(job, unlabelled={"pencil": file(tmp_path / "texts.csv")}), Recorder())
    (tmp_path / "few.csv").write_text("p0,p1\n" + "1,2\n" * 20)
    with pytest.raises(JobFailed, match="no column 'p2'"):
        run(msgspec.structs.replace(job, unlabelled={"pencil": file(tmp_path / "few.csv")}), Recorder())


def test_the_command_line_takes_the_file_of_a_domain_by_its_path(tmp_path: Path) -> None:
    adapting(tmp_path, "any")
    written = tmp_path / "recipe.yaml"
    written.write_text(
        "model: mlp\ntraining_file: ink.csv\nname: cli\nterms:\n  - {type: coral, file: pencil.csv}\n"
        "hyperparameters: {n_epochs: 1, batch_size: 64, learning_rate: 0.01}\n"
    )
    where: dict[str, Any] = {"home": tmp_path / "home", "repository": tmp_path / "models", "backbones": {}}
    assert command.finetune(written, **where) == 0
    assert read_manifest(tmp_path / "models/cli/1").lineage.unlabelled_sha256 == [file(tmp_path / "pencil.csv").sha256]
    (tmp_path / "pencil.csv").unlink()
    assert command.finetune(written, **where) == 2
