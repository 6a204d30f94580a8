"""Jobs whose bundles have graphs of other precisions, and the server that chooses among them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits

from export import bundle
from export.variants import Report
from finetune.recipe import CrossEntropy, Data, NextToken, Optimization, Recipe, SquaredError
from finetune.run import run
from finetune.task import contradiction
from server.runtime import deployment
from server.runtime.deployment import Deployment
from server.runtime.model import load
from server.settings import Settings
from tests.finetune.small import Recorder
from tests.finetune.test_run import file, request, table


@pytest.mark.slow
def test_a_classifier_is_published_with_what_is_good_enough_and_served(tmp_path: Path) -> None:
    digits, reporter = load_digits(), Recorder()
    digits.feature_names = [f"pixel {i}" for i in range(64)]
    job = request(
        tmp_path,
        table(tmp_path / "digits.csv", digits, [str(name) for name in range(10)]),
        data=Data(validation=0.2, test=0.2),
        optimization=Optimization(most_loss=0.02),
    )
    manifest = run(job, reporter)
    folder = tmp_path / "repository" / "model" / "1"
    assert bundle.verify(folder) == manifest
    kept = [one.precision for one in manifest.variants]
    assert kept == ["int8", "float16"]
    for one in manifest.variants:
        assert one.metrics.keys() == {"accuracy", "macro_f1"}
        assert one.metrics["accuracy"] >= 0.98 * manifest.metrics["accuracy"]
        assert one.speeds["cpu"] > 0
    report = msgspec.json.decode((folder / "optimization.json").read_bytes(), type=Report)
    assert [one.precision for one in report.tried] == ["float32", "int8", "float16"]
    assert report.tried[0].metrics["accuracy"] == pytest.approx(manifest.metrics["accuracy"], abs=0.003)
    assert "| int8 |" in (folder / "MODEL_CARD.md").read_text()

    settings = Settings(home=tmp_path, providers=["CPUExecutionProvider"])
    answers = {}
    given = {"vector": digits.data[:64].astype(np.float32)}
    for precision in ("float32", "int8", "float16"):
        served = load(folder, settings, msgspec.convert({"precision": precision}, Deployment))
        assert served.session is not None
        answers[precision] = served.session.run(given, ["logits"])[0]
    assert np.abs(answers["int8"] - answers["float32"]).max() > 0
    assert 0 < np.abs(answers["float16"] - answers["float32"]).max() < 0.1
    by_itself = load(folder, settings, Deployment()).session
    assert by_itself is not None
    np.testing.assert_array_equal(by_itself.run(given, ["logits"])[0], answers[manifest.serving.get("cpu", "float32")])
    with pytest.raises(bundle.DamagedBundle, match="precision bfloat16 is asked for; the bundle has float32, int8"):
        load(folder, settings, Deployment(precision="bfloat16"))

    damaged = folder / "model.int8.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(bundle.DamagedBundle, match=r"model\.int8\.onnx"):
        bundle.verify(folder)


@pytest.mark.slow
def test_numbers_are_judged_by_their_errors(tmp_path: Path) -> None:
    data = load_diabetes()
    path = tmp_path / "diabetes.csv"
    rows = [",".join([*data.feature_names, "label"])]
    rows += [",".join(map(str, [*row, target])) for row, target in zip(data.data, data.target, strict=True)]
    path.write_text("\n".join(rows))
    manifest = run(
        request(
            tmp_path,
            file(path),
            objective=SquaredError(),
            optimization=Optimization(precisions=("float16",), most_loss=0.02),
        ),
        Recorder(),
    )
    (half,) = manifest.variants
    assert half.metrics.keys() == {"mae", "rmse"}
    assert half.metrics["mae"] <= 1.02 * manifest.metrics["mae"]


def test_it_is_refused_where_it_cannot_be_judged() -> None:
    recipe = Recipe(model="transformer_decoder", training_file="file-1", optimization=Optimization())
    found = contradiction(NextToken(), recipe)
    assert found is not None
    assert found[0] == "optimization"
    assert "take quantization" in found[1]
    assert contradiction(CrossEntropy(), recipe) is None


def test_precisions_of_a_deployment_are_those_of_a_recipe() -> None:
    for precision in ("float16", "bfloat16", "int8"):
        Optimization(precisions=(precision,))
        assert deployment.Deployment(precision=precision).precision == precision
