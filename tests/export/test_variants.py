"""Graphs in other precisions: what they compute, and which of them are kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

from export import half_precision, int8
from export.onnx import export_onnx
from export.variants import Optimization, add_variants, worst
from models import registry
from models.spec import Classification, ModelSpec

SPECS = {
    "mlp": ModelSpec(architecture="mlp", hyperparameters={"features": 64, "hidden": [32, 16]}, task=Classification(10)),
    "lenet5": ModelSpec(architecture="lenet5", hyperparameters={"image_size": 32}, task=Classification(10)),
    "lstm": ModelSpec(
        architecture="lstm",
        hyperparameters={"vocabulary": 50, "width": 16, "embedding": 16, "max_length": 32},
        task=Classification(3),
    ),
    "transformer_encoder": ModelSpec(
        architecture="transformer_encoder",
        hyperparameters={"vocabulary": 50, "width": 32, "layers": 2, "heads": 2, "max_length": 32},
        task=Classification(3),
    ),
}


def inputs(name: str, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    if name == "mlp":
        return {"vector": random.normal(size=(rows, 64)).astype(np.float32)}
    if name == "lenet5":
        return {"pixels": random.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)}
    ids = random.integers(2, 50, (rows, 12))
    mask = np.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@cache
def exported(name: str) -> bytes:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(registry.build(SPECS[name]).eval(), Path(folder), inputs(name, 3))
        return (Path(folder) / "model.onnx").read_bytes()


def written(name: str, folder: Path) -> Path:
    (folder / "model.onnx").write_bytes(exported(name))
    return folder / "model.onnx"


def answered(path: Path, given: Mapping[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["logits"], dict(given))[0]
    return found


@pytest.mark.parametrize("name", list(SPECS))
def test_half_precision_takes_and_gives_what_float32_does(name: str, tmp_path: Path) -> None:
    path, target = written(name, tmp_path), tmp_path / "model.float16.onnx"
    half_precision.half(path, target, "float16")
    onnx.checker.check_model(str(target))
    for rows in (2, 5):
        given = inputs(name, rows, rows)
        before, after = answered(path, given), answered(target, given)
        assert after.dtype == np.float32
        assert 0 < np.abs(after - before).max() < 0.01 * max(1.0, np.abs(before).max())
    whole, half = onnx.load(path), onnx.load(target)
    assert TensorProto.FLOAT not in {tensor.data_type for tensor in half.graph.initializer}
    assert [value.type for value in half.graph.input] == [value.type for value in whole.graph.input]
    if name != "lenet5":  # which is mostly other bytes
        assert target.stat().st_size < path.stat().st_size


def test_bfloat16_rounds_as_torch_does(tmp_path: Path) -> None:
    path, target = written("mlp", tmp_path), tmp_path / "model.bfloat16.onnx"
    half_precision.half(path, target, "bfloat16")
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    compared = 0
    for tensor in onnx.load(target).graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
            right = torch.from_numpy(before[tensor.name].copy()).bfloat16().float().numpy()
            np.testing.assert_array_equal(bits.view(np.float32), right.ravel())
            compared += 1
    assert compared >= 4


def test_an_operator_that_onnx_does_not_know_in_bfloat16_is_named(tmp_path: Path) -> None:
    target = tmp_path / "model.bfloat16.onnx"
    with pytest.raises(ValueError, match=r"bfloat16: ONNX has no such operator: .*Conv"):
        half_precision.half(written("lenet5", tmp_path), target, "bfloat16")
    assert not target.exists()


def large_graph(path: Path, factor: float) -> Path:
    """Times `factor`, and back."""
    nodes = [
        helper.make_node("Mul", ["vector", "factor"], ["large"]),
        helper.make_node("Div", ["large", "factor"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.float32([factor]), "factor")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_the_largest_number_inside_is_found(tmp_path: Path) -> None:
    path = large_graph(tmp_path / "model.onnx", 1000.0)
    batches = [{"vector": np.float32([[1, -2]])}, {"vector": np.float32([[90, 3], [4, 5]])}]
    assert half_precision.largest_values(path, batches) == ("large", 90_000.0)


def test_what_float16_cannot_hold_is_not_kept(tmp_path: Path) -> None:
    path = large_graph(tmp_path / "model.onnx", 1000.0)
    given = {"vector": np.float32([[90, 3]])}
    _, _, report = add_variants(path.parent, optimization(["float16"], [given], lambda path: {"accuracy": 1.0}), print)
    assert not report.tried[1].kept
    assert report.tried[1].reason == "float16 ends at 65,504, and large reaches 90,000"
    assert not (tmp_path / "model.float16.onnx").exists()
    with pytest.raises(ValueError, match="factor has 100,000"):
        half_precision.half(large_graph(path, 1e5), tmp_path / "half.onnx", "float16")


def optimization(
    precisions: list[Any],
    calibration: list[dict[str, np.ndarray]],
    judge: Callable[[Path], Mapping[str, float]],
    most_loss: float = 0.01,
    *,
    text: bool = False,
) -> Optimization:
    return Optimization(
        precisions=precisions,
        most_loss=most_loss,
        judge=lambda path, provider: judge(path),
        falling=frozenset({"mae"}),
        calibration=calibration,
        sample=calibration[0],
        text=text,
    )


@pytest.fixture(scope="module")
def digits(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[np.ndarray], Callable[[Path], dict[str, float]]]:
    """A graph that tells scikit-learn's digits apart, batches that it has learned from, and its accuracy on others."""
    data = load_digits()
    pixels, labels = data.data.astype(np.float32), data.target
    torch.manual_seed(0)
    network = registry.build(SPECS["mlp"])
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for step in range(300):
        rows = np.random.default_rng(step).integers(0, 1200, 64)
        loss = torch.nn.functional.cross_entropy(
            network(torch.from_numpy(pixels[rows]))["logits"], torch.from_numpy(labels[rows])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("digits")
    export_onnx(network.eval(), folder, {"vector": pixels[:3]})

    def accuracy(path: Path) -> dict[str, float]:
        return {"accuracy": float((answered(path, {"vector": pixels[1200:]}).argmax(1) == labels[1200:]).mean())}

    return folder, [pixels[start : start + 32] for start in (0, 32, 64)], accuracy


def test_good_ones_are_kept_and_the_fastest_serves(
    digits: tuple[Path, list[np.ndarray], Callable[[Path], dict[str, float]]],
) -> None:
    folder, batches, accuracy = digits
    wanted = optimization(["int8", "float16", "bfloat16"], [{"vector": batch} for batch in batches], accuracy)
    said: list[str] = []
    variants, serving, report = add_variants(folder, wanted, said.append)
    assert accuracy(folder / "model.onnx")["accuracy"] > 0.85
    assert [one.precision for one in variants] == ["int8", "float16"]
    by_name = {one.precision: one for one in report.tried}
    for one in variants:
        path = folder / f"model.{one.precision}.onnx"
        assert accuracy(path) == one.metrics == by_name[one.precision].metrics
        assert path.stat().st_size == by_name[one.precision].bytes < by_name["float32"].bytes
    assert by_name["bfloat16"].reason == "bfloat16 runs on CUDA only, and there is none here to judge it on" or (
        torch.cuda.is_available()
    )
    fastest = max(("float32", "int8"), key=lambda name: by_name[name].samples_per_second["cpu"])
    assert report.serving["cpu"] == fastest
    assert serving.get("cpu", "float32") == fastest
    if not torch.cuda.is_available():
        assert "cuda" not in serving  # it could not be timed
    assert any(sentence.startswith("int8 is kept: accuracy") for sentence in said)
    assert any(sentence.startswith("bfloat16 is not kept") for sentence in said) or torch.cuda.is_available()


def test_too_much_lost_is_not_kept(
    digits: tuple[Path, list[np.ndarray], Callable[[Path], dict[str, float]]], tmp_path: Path
) -> None:
    folder, batches, accuracy = digits
    whole = tmp_path / "model.onnx"
    whole.write_bytes((folder / "model.onnx").read_bytes())
    # Ranges of inputs that are nearly nothing: real ones are cut off.
    wanted = optimization(["int8"], [{"vector": batches[0] * 1e-6}], accuracy)
    variants, serving, report = add_variants(tmp_path, wanted, print)
    assert variants == []
    assert "cpu" not in serving
    tried = report.tried[1]
    assert tried.reason is not None
    assert "accuracy is" in tried.reason
    assert "1 are allowed" in tried.reason
    assert list(tmp_path.iterdir()) == [whole]


def test_a_text_model_is_quantized_by_its_matrices(tmp_path: Path) -> None:
    path, target = written("transformer_encoder", tmp_path), tmp_path / "int8.onnx"
    int8.dynamic(path, target)
    kinds = {node.op_type for node in onnx.load(target).graph.node}
    assert kinds & {"MatMulInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLinear"}
    given = inputs("transformer_encoder", 5)
    before, after = answered(path, given), answered(target, given)
    assert 0 < np.abs(after - before).max() < 0.2 * np.abs(before).max()


def test_convolutions_are_quantized_on_data_and_the_ends_can_stay(tmp_path: Path) -> None:
    path = written("lenet5", tmp_path)
    given = inputs("lenet5", 16)
    right = answered(path, given)
    errors = []
    for ends in (True, False):
        int8.static(path, tmp_path / "int8.onnx", [given], ends=ends)
        errors.append(float(np.abs(answered(tmp_path / "int8.onnx", given) - right).max()))
        quantized = [node for node in onnx.load(tmp_path / "int8.onnx").graph.node if node.op_type == "QuantizeLinear"]
        assert quantized
    assert 0 < errors[1] < errors[0] < 0.2 * np.abs(right).max()


def test_the_worst_metric_counts() -> None:
    reference = {"accuracy": 0.9, "macro_f1": 0.8, "mae": 2.0}
    falling = frozenset({"mae"})
    assert worst(reference, {"accuracy": 0.9, "macro_f1": 0.79, "mae": 1.9}, falling)[0] == "macro_f1"
    name, share = worst(reference, {"accuracy": 0.95, "macro_f1": 0.8, "mae": 2.1}, falling)
    assert (name, round(share, 6)) == ("mae", 0.05)
    assert worst(reference, {"accuracy": 0.9, "macro_f1": float("nan"), "mae": 2.0}, falling)[0] == "macro_f1"
