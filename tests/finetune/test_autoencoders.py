"""Autoencoders from a file without labels to a bundle, and from there to a classifier with few labels."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from export import bundle
from export.bundle import Manifest
from export.processing.images import decode_image
from export.processing.inputs import ImageInput, VectorInput
from finetune.admission import Refused, admit
from finetune.automatic import Chosen
from finetune.data.targets import Targets
from finetune.data.validation import inspect
from finetune.origin import find, load
from finetune.preprocess import Items
from finetune.recipe import CrossEntropy, Hyperparameters, KlSparsity, Recipe, Reconstruction, Transfer
from finetune.run import JobFailed, run
from finetune.run_request import FileRef, RunRequest
from models import registry
from models.network import Network
from models.spec import Classification, ModelSpec
from tests.finetune.small import Recorder, fit

DIGITS = load_digits()
UNLABELLED, TESTED = 1297, np.arange(1297, 1797)
# Deep, and of sigmoids: what few labels do not teach from random weights.
DEEP: dict[str, Any] = {
    "hidden": [64, 64, 64],
    "activation": "sigmoid",
    "code": 30,
    "code_activation": "sigmoid",
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def file(path: Path) -> FileRef:
    return FileRef(path=path, filename=path.name, sha256=bundle.sha256_of(path).sha256, id=f"file-{path.stem}")


def table(path: Path, rows: np.ndarray, labels: bool) -> FileRef:
    """Digits as vectors of 64 numbers."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*(f"pixel{i}" for i in range(64)), *["label"] * labels])
        writer.writerows([*DIGITS.data[row], *[f"digit {DIGITS.target[row]}"] * labels] for row in rows)
    return file(path)


def pictures(path: Path, items: int) -> FileRef:
    """Digits as PNGs at the top of a zip, in no class folders."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(DIGITS.images[:items]):
            stream = io.BytesIO()
            Image.fromarray((image * 15.9).astype(np.uint8)).save(stream, "PNG")
            archive.writestr(f"{i}.png", stream.getvalue())
    return file(path)


def learn(
    folder: Path, training: FileRef, name: str, model: str | ModelSpec, epochs: int, rate: float, **fields: Any
) -> Manifest:
    numbers = Hyperparameters(n_epochs=epochs, batch_size=fields.pop("batch", 64), learning_rate=rate)
    recipe = Recipe(model=model, training_file=training.id, seed=3, hyperparameters=numbers, **fields)
    request = RunRequest(
        recipe=recipe,
        training=training,
        validation=None,
        folder=folder / f"run-{name}",
        repository=folder / "repository",
        name=name,
        job_id=f"job-{name}",
    )
    return run(request, Recorder())


def asked(folder: Path, manifest: Manifest, graph: str = "model", **inputs: np.ndarray) -> dict[str, np.ndarray]:
    path = folder / "repository" / manifest.name / str(manifest.version) / f"{graph}.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository that holds "codes": a deep denoiser of digits, learned without their labels."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("codes")
    learn(
        folder,
        table(folder / "digits.csv", np.arange(UNLABELLED), labels=False),
        "codes",
        ModelSpec(architecture="autoencoder", hyperparameters=DEEP),
        60,
        5e-3,
        objective=Reconstruction(noise=0.5),
    )
    return folder


@pytest.mark.slow
def test_a_table_without_labels_becomes_an_autoencoder(codes: Path) -> None:
    manifest = bundle.verify(codes / "repository" / "codes" / "1")
    assert manifest.task == "reconstruction"
    assert manifest.input == VectorInput(features=64, names=[f"pixel{i}" for i in range(64)])
    assert manifest.labels == []
    assert [output.name for output in manifest.outputs] == ["reconstruction", "error", "embedding"]
    assert manifest.metrics["explained_variance"] > 0.2
    assert {"loss", "error", "validation_error"} <= manifest.metrics.keys()
    usual = DIGITS.data[TESTED].astype(np.float32)
    found = asked(codes, manifest, vector=usual)
    unusual = np.random.default_rng(0).permuted(usual, axis=1)
    assert np.median(asked(codes, manifest, vector=unusual)["error"]) > 3 * np.median(found["error"])
    card = (codes / "repository" / "codes" / "1" / "MODEL_CARD.md").read_text()
    assert "an autoencoder" in card
    assert "/v1/predict" in card
    assert "| 95% |" in card
    report = msgspec.json.decode((codes / "repository" / "codes" / "1" / "evaluation.json").read_bytes())
    assert sum(report["counts"]) == report["samples"]
    curve = msgspec.json.decode((codes / "repository" / "codes" / "1" / "training_curve.json").read_bytes())
    assert {"hidden0", "code", "decoder.spread"} <= curve["gradient_norms"][0]["norms"].keys()


def test_a_label_column_is_not_reconstructed(tmp_path: Path) -> None:
    training = table(tmp_path / "labelled.csv", np.arange(100), labels=True)
    report = inspect(training.path, training.filename)
    recipe = Recipe(model="autoencoder", training_file="file-labelled")
    assert admit(recipe, report=report, backbones={}, repository=tmp_path, allow_hub=False) == "autoencoder"
    manifest = learn(tmp_path, training, "plain", "autoencoder", 1, 1e-3)
    assert manifest.input == VectorInput(features=64, names=[f"pixel{i}" for i in range(64)])


@pytest.mark.slow
def test_few_labels_are_enough_for_an_encoder_that_knows_the_data(codes: Path) -> None:
    """Hinton, Osindero and Teh 2006; Vincent et al. 2008: five labels a class, over three draws of them."""
    start = find("codes", codes / "repository", {})
    vectors, targets = DIGITS.data.astype(np.float32), DIGITS.target.astype(np.int64)
    hyperparameters = {**start.spec.hyperparameters}
    spec = ModelSpec(architecture="autoencoder", hyperparameters=hyperparameters, task=Classification(10))

    def learned(network: Network, rows: np.ndarray, seed: int, folder: str) -> float:
        items = Items(targets[rows], None, np.arange(len(rows)), lambda chosen: {"vector": vectors[rows[chosen]]})
        chosen = Chosen(epochs=20, batch_size=10, learning_rate=3e-3)
        fit(network, items, codes / folder / str(seed), chosen=chosen, seed=seed, held_out=10, objective=None)
        with torch.no_grad():
            logits = network(torch.from_numpy(vectors[TESTED]))["logits"]
        return float((logits.argmax(1).numpy() == targets[TESTED]).mean())

    known, unknown = [], []
    for seed in range(3):
        random = np.random.default_rng(seed)
        each = [random.choice(np.flatnonzero(targets[:UNLABELLED] == digit), 5, replace=False) for digit in range(10)]
        rows = random.permutation(np.concatenate(each))
        torch.manual_seed(seed)
        pretrained = load(start, spec, Targets([str(i) for i in range(10)], targets, targets), {})
        known.append(learned(pretrained, rows, seed, "known"))
        torch.manual_seed(seed)
        fresh = registry.build(spec)
        fresh.measure(lambda: [torch.from_numpy(vectors[:UNLABELLED])], torch.from_numpy(targets).float())
        unknown.append(learned(fresh, rows, seed, "unknown"))
    assert np.mean(known) > np.mean(unknown) + 0.15


@pytest.mark.slow
def test_a_published_autoencoder_goes_on_as_a_classifier(codes: Path) -> None:
    training = table(codes / "labelled.csv", np.arange(200), labels=True)
    before = registry.restore(codes / "repository" / "codes" / "1").state_dict()
    frozen = learn(
        codes, training, "frozen", "codes:1", 2, 1e-2, objective=CrossEntropy(), transfer=Transfer(freeze="all")
    )
    assert frozen.task == "classification"
    assert frozen.labels == [f"digit {i}" for i in range(10)]
    assert frozen.lineage.base_model == "codes:1"
    after = registry.restore(codes / "repository" / "frozen" / "1").state_dict()
    trunk = {name for name in before if name.startswith("trunk.")}
    assert after.keys() == trunk | {"head.weight", "head.bias"}
    assert all(torch.equal(before[name], after[name]) for name in trunk)
    found = asked(codes, frozen, vector=DIGITS.data[:5].astype(np.float32))
    assert found["logits"].shape == (5, 10)
    reconstructed = asked(
        codes, bundle.verify(codes / "repository" / "codes" / "1"), vector=DIGITS.data[:5].astype("f4")
    )
    np.testing.assert_allclose(found["embedding"], reconstructed["embedding"], atol=1e-6)

    learn(
        codes,
        training,
        "gradual",
        "codes",
        3,
        1e-3,
        objective=CrossEntropy(),
        transfer=Transfer(freeze="hidden2", unfreeze_epoch=1, gradual=True),
    )
    curve = msgspec.json.decode((codes / "repository" / "gradual" / "1" / "training_curve.json").read_bytes())
    learning = [list(point["norms"]) for point in curve["gradient_norms"]]
    assert learning[0] == ["code", "head"]
    assert learning[-1] == ["hidden1", "hidden2", "code", "head"]


@pytest.mark.slow
def test_a_published_autoencoder_goes_on_reconstructing(codes: Path) -> None:
    training = file(codes / "digits.csv")
    again = learn(codes, training, "again", "codes", 1, 1e-5)
    before = bundle.verify(codes / "repository" / "codes" / "1")
    assert again.metrics["error"] == pytest.approx(before.metrics["error"], rel=0.05)
    with pytest.raises(JobFailed, match="the data are images, codes:1 reads vectors"):
        learn(codes, pictures(codes / "some.zip", 20), "wrong", "codes", 1, 1e-3)


@pytest.mark.slow
def test_images_without_labels_become_a_variational_autoencoder(tmp_path: Path) -> None:
    hyperparameters = {"image_size": 16, "channels": [8, 16], "hidden": [32], "latent": 6}
    model = ModelSpec(architecture="vae", hyperparameters=hyperparameters)
    training = pictures(tmp_path / "digits.zip", 600)
    report = inspect(training.path, training.filename)
    recipe = Recipe(model=model, training_file="file-digits")
    assert admit(recipe, report=report, backbones={}, repository=tmp_path, allow_hub=False) == "vae"
    manifest = learn(tmp_path, training, "drawn", model, 10, 5e-3, batch=16)
    folder = tmp_path / "repository" / "drawn" / "1"
    assert bundle.verify(folder) == manifest
    assert isinstance(manifest.input, ImageInput)
    assert manifest.task == "reconstruction"
    assert manifest.metrics["loss"] == pytest.approx(manifest.metrics["surprise"] + manifest.metrics["kl"], rel=1e-6)
    assert manifest.metrics["kl"] > 0.0
    assert manifest.metrics["explained_variance"] > 0.3
    (latent,) = manifest.graphs["generator"].inputs
    (image,) = manifest.graphs["generator"].outputs
    assert (latent.name, latent.dtype, latent.shape) == ("latent", "float32", ["batch", 6])
    assert (image.name, image.dtype, image.shape) == ("image", "uint8", ["batch", 16, 16, 3])
    with zipfile.ZipFile(training.path) as archive:
        pixels = np.stack([decode_image(archive.read(f"{i}.png"), manifest.input) for i in range(4)])
    found = asked(tmp_path, manifest, pixels=pixels)
    assert found["reconstruction"].dtype == np.uint8
    squares = np.square(found["reconstruction"] / 255.0 - pixels / 255.0).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found["error"], squares, rtol=0.05)
    made = asked(tmp_path, manifest, "generator", latent=found["embedding"])["image"]
    assert np.abs(made.astype(int) - found["reconstruction"]).max() <= 1
    assert "/v1/images/generations" in (folder / "MODEL_CARD.md").read_text()
    for name in ("reconstructions.png", "samples.png", "evaluation.png"):
        with Image.open(folder / name) as picture:
            assert picture.size[0] > 400


@pytest.mark.parametrize(
    ("model", "objective", "field", "words"),
    [
        ("mlp", Reconstruction(), "objective", "mlp cannot learn by reconstruction"),
        ("vae", Reconstruction(), "objective", "vae cannot learn by reconstruction; it can by elbo"),
        (
            ModelSpec(architecture="autoencoder"),
            Reconstruction(sparsity=KlSparsity()),
            "objective",
            "give it code_activation sigmoid",
        ),
        ("autoencoder", CrossEntropy(), "training_file", "no column 'label'"),
        (ModelSpec(architecture="autoencoder", hyperparameters={"code": 0}), None, "model", "code"),
        (ModelSpec(architecture="vae", task=Classification(3)), None, "model.task", "elbo teaches reconstruction"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_handed_in(
    tmp_path: Path, model: str | ModelSpec, objective: Any, field: str, words: str
) -> None:
    training = table(tmp_path / "x.csv", np.arange(20), labels=False)
    recipe = Recipe(model=model, training_file="file-x", objective=objective)
    with pytest.raises(Refused, match=words) as refused:
        admit(
            recipe,
            report=inspect(training.path, training.filename),
            backbones={},
            repository=tmp_path,
            allow_hub=False,
        )
    assert refused.value.param == field
