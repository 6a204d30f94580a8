"""No skew: the same bytes give the same tensor in training and over HTTP, seen through graphs that echo their input."""

from __future__ import annotations

import base64
import csv
import io
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from export.bundle import Lineage, Manifest, Parity, TensorSpec
from export.processing.inputs import ImageInput, InputSpec, TextInput, VectorInput
from export.publish import publish
from export.staging import staging
from finetune.data.datasets import open_dataset
from finetune.preprocess import prepare
from finetune.recipe import Data
from models.backbones.weights import tokenizer_json
from server.settings import Settings
from tests.server.conftest import running

# Embeddings are scaled to unit length; a known last number gives the scale back.
LAST = 1000.0
TOKENS = 16


def publish_echo(
    repository: Path, spec: InputSpec, width: int, dtype: int, shape: list[int | str], tokenizer: bytes
) -> None:
    """A model whose embedding is its input, flat, and LAST behind it."""
    name = {ImageInput: "pixels", TextInput: "input_ids", VectorInput: "vector"}[type(spec)]
    inputs = [helper.make_tensor_value_info(name, dtype, shape)]
    if isinstance(spec, TextInput):
        inputs.append(helper.make_tensor_value_info("attention_mask", dtype, shape))
    nodes = [
        helper.make_node("Cast", [name], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["numbers", "flat_shape"], ["flat"]),
        helper.make_node("Pad", ["flat", "one_behind", "last"], ["embedding"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([-1, width]), "flat_shape"),
        numpy_helper.from_array(np.array([0, 0, 0, 1]), "one_behind"),
        numpy_helper.from_array(np.float32(LAST), "last"),
    ]
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", width + 1])
    graph = helper.make_graph(nodes, "echo", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    with staging(repository) as folder:
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        (folder / "tokenizer.json").write_bytes(tokenizer)
        draft = Manifest(
            name="echo",
            version=0,
            created_at=datetime.now(UTC),
            task="embedding",
            input=spec,
            inputs=[TensorSpec(name=name, dtype=helper.tensor_dtype_to_np_dtype(dtype).name, shape=shape, unit="1")],
            outputs=[TensorSpec(name="embedding", dtype="float32", shape=["batch", width + 1], unit="1")],
            model={"architecture": "echo"},
            parity=Parity(samples=1, largest_difference=0.0, tolerance=1e-4, top1_disagreements=0, batch_sizes=[1]),
            lineage=Lineage(base_model="echo"),
            files={},
        )
        publish(folder, repository, draft)


def over_http(home: Path, given: list[object]) -> np.ndarray:
    """What the graph received for each input, flat."""
    with running(Settings(home=home, port=0, worker=False)) as live:
        response = live.client.post("/v1/embeddings", json={"model": "echo", "input": given})
        assert response.status_code == 200, response.text
        found = np.array([one["embedding"] for one in response.json()["data"]], np.float64)
    return found[:, :-1] / found[:, -1:] * LAST


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_images(tmp_path: Path, resize: str, form: str) -> None:
    spec = ImageInput(height=9, width=11, resize=resize)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(6):
            file = io.BytesIO()
            pixels = random.integers(0, 256, (20 + i, 30 - 3 * i, 3), np.uint8)
            Image.fromarray(pixels).save(file, form)
            archive.writestr(f"{'ab'[i % 2]}/{i}", file.getvalue())
    dataset = open_dataset(tmp_path / "x.zip", "x.zip", Data())
    trained_on = prepare(dataset, spec, None, tmp_path, lambda done, items: None).batch(np.arange(6))["pixels"]
    publish_echo(tmp_path / "repository", spec, 9 * 11 * 3, TensorProto.UINT8, ["batch", 9, 11, 3], b"")
    urls = ["data:image/png;base64," + base64.b64encode(dataset.content(i)).decode() for i in range(6)]
    served = over_http(tmp_path, list(urls))
    np.testing.assert_allclose(served, trained_on.reshape(6, -1), atol=0.01)


def test_texts(tmp_path: Path) -> None:
    tokenizer, padding = tokenizer_json("minilm-l6-v2")
    spec = TextInput(max_length=TOKENS, pad_token_id=padding)
    texts = [
        f"Ünïcode, {word} & <b>tags</b> — and “quotes”, long enough to be cut: {i} {'x ' * 9}"
        for i, word in enumerate("abcd")
    ]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, str(i % 2)) for i, text in enumerate(texts))])
    dataset = open_dataset(tmp_path / "x.csv", "x.csv", Data())
    trained_on = prepare(dataset, spec, tokenizer, tmp_path, lambda done, items: None).batch(np.arange(4))["input_ids"]
    assert trained_on.shape == (4, TOKENS)
    publish_echo(tmp_path / "repository", spec, TOKENS, TensorProto.INT64, ["batch", "sequence"], tokenizer)
    served = over_http(tmp_path, list(texts))
    np.testing.assert_allclose(served, trained_on, atol=0.1)


def test_vectors(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 5)) * [1, 10, 100, 0.01, 1]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [[*"abcde", "label"], *([*map(repr, map(float, row)), i % 2] for i, row in enumerate(rows))]
        )
    spec = VectorInput(features=5)
    dataset = open_dataset(tmp_path / "x.csv", "x.csv", Data())
    trained_on = prepare(dataset, spec, None, tmp_path, lambda done, items: None).batch(np.arange(6))["vector"]
    publish_echo(tmp_path / "repository", spec, 5, TensorProto.FLOAT, ["batch", 5], b"")
    np.testing.assert_allclose(over_http(tmp_path, rows.tolist()), trained_on, rtol=1e-4, atol=1e-3)
