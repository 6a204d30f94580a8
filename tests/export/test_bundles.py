"""Export, parity, report and atomic publishing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_recall_fscore_support

from export import bundle
from export.bundle import DamagedBundle, Lineage, Manifest
from export.bundling import bundle as make_bundle
from export.onnx import export_onnx
from export.parity import ParityError, check
from export.processing.answers import softmax, top_k
from export.processing.images import decode_image
from export.processing.inputs import VectorInput
from export.reports import classification
from export.staging import sweep
from export.untouched import export_backbone
from models import registry
from models.network import Network
from models.spec import Classification, ModelSpec

LABELS = ["ant", "bee", "cat"]


def network() -> Network:
    torch.manual_seed(0)
    return registry.build(
        ModelSpec(architecture="mlp", hyperparameters={"features": 4}, task=Classification(len(LABELS)))
    )


def batches(count: int = 3) -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    for _ in range(count):
        yield {"vector": random.normal(size=(5, 4)).astype(np.float32)}


def published(repository: Path, name: str = "insects") -> Manifest:
    random = np.random.default_rng(0)
    evaluation = classification.evaluation(random.normal(size=(30, 3)).astype(np.float32), np.arange(30) % 3, LABELS)
    return make_bundle(
        network(),
        name=name,
        repository=repository,
        input=VectorInput(features=4),
        labels=LABELS,
        tokenizer=None,
        validation=batches(),
        metrics=evaluation.figures(),
        evaluation=evaluation,
        lineage=Lineage(base_model="mlp"),
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    published(folder)
    return folder


def test_a_published_bundle_is_whole_and_answers_as_the_network_does(repository: Path) -> None:
    manifest = bundle.verify(repository / "insects" / "1")
    assert {
        "model.onnx",
        "weights.safetensors",
        "model.json",
        "evaluation.json",
        "evaluation.png",
        "MODEL_CARD.md",
    } == set(manifest.files)
    assert manifest.parity.samples == 15
    assert len(manifest.parity.batch_sizes) >= 2
    assert [tensor.shape[0] for tensor in (*manifest.inputs, *manifest.outputs)] == ["batch"] * 3
    session = onnxruntime.InferenceSession(str(repository / "insects" / "1" / "model.onnx"))
    x = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
    restored = registry.restore(repository / "insects" / "1").eval()
    with torch.no_grad():
        expected = restored(torch.from_numpy(x))["logits"].numpy()
    np.testing.assert_allclose(session.run(["logits"], {"vector": x})[0], expected, atol=1e-5)


def test_the_card_and_the_picture_are_for_people(repository: Path) -> None:
    card = (repository / "insects" / "1" / "MODEL_CARD.md").read_text()
    assert all(f"`{label}`" in card for label in LABELS)
    assert "/v1/classify" in card
    assert (repository / "insects" / "1" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("file", ["model.onnx", "weights.safetensors", "MODEL_CARD.md"])
def test_one_flipped_bit_is_noticed(repository: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", repository / "insects" / "1", copy], check=True)
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)
    with pytest.raises(DamagedBundle, match=file):
        bundle.verify(copy)


def test_a_missing_file_a_broken_manifest_and_a_path_outside_are_noticed(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", repository / "insects" / "1", copy], check=True)
    manifest = bundle.read_manifest(copy)
    (copy / "model.onnx").unlink()
    with pytest.raises(DamagedBundle, match=r"model\.onnx: missing"):
        bundle.verify(copy)
    outside = msgspec.structs.replace(manifest, files={"../x": manifest.files["model.onnx"]})
    (copy / "manifest.json").write_bytes(msgspec.json.encode(outside))
    with pytest.raises(DamagedBundle, match="outside"):
        bundle.verify(copy)
    (copy / "manifest.json").write_text('{"format": 1')
    with pytest.raises(DamagedBundle, match=r"manifest\.json"):
        bundle.verify(copy)


def test_versions_count_as_numbers(tmp_path: Path) -> None:
    for version in (2, 10, 9):
        (tmp_path / "m" / str(version)).mkdir(parents=True)
        (tmp_path / "m" / str(version) / "manifest.json").touch()
    (tmp_path / "m" / "11").mkdir()  # without a manifest it is no version
    assert bundle.versions(tmp_path, "m") == [2, 9, 10]
    assert bundle.names(tmp_path) == ["m"]


def test_parity_refuses_a_graph_of_other_weights(tmp_path: Path) -> None:
    export_onnx(network(), tmp_path, next(batches()))
    torch.manual_seed(1)
    other = registry.build(network().spec)
    with pytest.raises(ParityError, match="differ by"):
        check(other, tmp_path, batches())


def test_parity_allows_large_values_their_own_rounding(tmp_path: Path) -> None:
    large = network()
    assert large.head is not None
    large.head.weight.data.mul_(1e5)
    export_onnx(large, tmp_path, next(batches()))
    found = check(large, tmp_path, batches())
    assert found.top1_disagreements == 0
    large.head.weight.data[0, 0] *= 1.01
    with pytest.raises(ParityError, match=r"logits at .* differ by"):
        check(large, tmp_path, batches())


def test_parity_refuses_a_frozen_batch(tmp_path: Path) -> None:
    import onnx

    export_onnx(network(), tmp_path, next(batches()))
    model = onnx.load(tmp_path / "model.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 5
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match="batch"):
        check(network(), tmp_path, batches())


def test_parity_needs_samples(tmp_path: Path) -> None:
    export_onnx(network(), tmp_path, next(batches()))
    with pytest.raises(ParityError, match="no samples"):
        check(network(), tmp_path, [])


def test_nothing_is_published_when_parity_fails(tmp_path: Path) -> None:
    bad = network()
    bad.head.weight.data.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(ParityError):
        make_bundle(
            bad,
            name="bad",
            repository=tmp_path,
            input=VectorInput(features=4),
            labels=LABELS,
            tokenizer=None,
            validation=batches(),
            metrics={},
            evaluation=None,
            lineage=Lineage(base_model="mlp"),
        )
    assert bundle.names(tmp_path) == []
    assert list((tmp_path / ".staging").iterdir()) == []


def test_figures_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    targets = random.integers(0, 4, 200)
    logits = random.normal(size=(200, 4)).astype(np.float32) + 2 * np.eye(4, dtype=np.float32)[targets]
    found = classification.evaluation(logits, targets, list("abcd"))
    answers = logits.argmax(1)
    assert found.accuracy == pytest.approx(accuracy_score(targets, answers))
    assert found.macro_f1 == pytest.approx(f1_score(targets, answers, average="macro"))
    assert found.loss == pytest.approx(log_loss(targets, softmax(logits.astype(np.float64))))
    precision, recall, _, support = precision_recall_fscore_support(targets, answers)
    assert [c.precision for c in found.classes] == pytest.approx(list(precision))
    assert [c.recall for c in found.classes] == pytest.approx(list(recall))
    assert [c.support for c in found.classes] == list(support)
    assert np.array(found.confusion).sum() == 200


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    # Always 0.9 sure and right half of the time.
    logits = np.tile(np.log(np.array([0.9, 0.1], np.float32)), (100, 1))
    found = classification.evaluation(logits, np.arange(100) % 2, ["a", "b"])
    assert found.calibration_error == pytest.approx(0.4, abs=1e-5)


PUBLISHER = """
import os, sys
from datetime import UTC, datetime
from pathlib import Path
from export.bundle import Lineage, Manifest, Parity
from export.processing.inputs import VectorInput
from export.publish import publish
from export.staging import staging

repository = Path(sys.argv[1])
parity = Parity(samples=1, largest_difference=0.0, tolerance=0.0, top1_disagreements=0, batch_sizes=[1])
draft = Manifest(name="m", version=0, created_at=datetime.now(UTC), task="classification", model={}, files={},
                 input=VectorInput(features=1), inputs=[], outputs=[], parity=parity, lineage=Lineage(base_model="x"))
for _ in range(10):
    with staging(repository) as folder:
        (folder / "model.onnx").write_bytes(os.urandom(1000))
        print(publish(folder, repository, draft).version)
"""


def test_publishers_at_once_each_get_a_version(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUBLISHER, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    found = [int(line) for process in processes for line in process.communicate()[0].split()]
    assert sorted(found) == list(range(1, 41))
    for version in found:
        assert bundle.verify(tmp_path / "m" / str(version)).version == version


KILLED = """
import sys, os, time
from pathlib import Path
from export.staging import staging
with staging(Path(sys.argv[1])) as folder:
    (folder / "model.onnx").write_bytes(b"x" * 10_000_000)
    (folder / "manifest.json").write_text("{}")
    print("staged", flush=True)
    time.sleep(60)
"""


def test_a_killed_publisher_leaves_nothing_visible_and_sweep_spares_the_living(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"staged\n"
    sweep(tmp_path)
    assert len(list((tmp_path / ".staging").iterdir())) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert bundle.names(tmp_path) == []
    deadline = time.monotonic() + 10
    while list((tmp_path / ".staging").iterdir()) and time.monotonic() < deadline:
        sweep(tmp_path)
    assert list((tmp_path / ".staging").iterdir()) == []


@pytest.mark.slow
def test_untouched_backbones_know_photographs_and_sentences(tmp_path: Path) -> None:
    import io

    from PIL import Image
    from skimage import data

    manifest = export_backbone("efficientnet-lite0", name="imagenet", repository=tmp_path, backbones={})
    assert len(manifest.labels) == 1000
    session = onnxruntime.InferenceSession(str(tmp_path / "imagenet" / "1" / "model.onnx"))
    for photograph, expected in (
        (data.chelsea(), {"tiger cat", "Egyptian cat", "tabby"}),
        (data.coffee(), {"espresso"}),
    ):
        file = io.BytesIO()
        Image.fromarray(photograph).save(file, "PNG")
        pixels = decode_image(file.getvalue(), manifest.input)[None]  # type: ignore[arg-type]
        logits = session.run(["logits"], {"pixels": pixels})[0]
        assert top_k(softmax(logits)[0], manifest.labels, 1)[0].label in expected
    encoder = export_backbone("minilm-l6-v2", name=None, repository=tmp_path, backbones={})
    assert (encoder.task, encoder.labels) == ("embedding", [])
    assert len(encoder.parity.lengths) >= 2
