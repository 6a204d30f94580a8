"""Small bundles published for the server to load: graphs written by hand, so that no test waits for an export."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from export.bundle import GraphSpec, Head, Interval, Lineage, Manifest, Parity, TensorSpec
from export.processing.inputs import ImageInput, InputSpec, LatentInput, SeriesInput, TextInput, VectorInput
from export.publish import publish
from export.staging import staging

WIDTH = 4


def publish_vectors(repository: Path, name: str = "points", features: int = 2) -> Manifest:
    """Two classes of vectors: "above" where the last number is positive, else "below"."""
    nodes = [helper.make_node("Identity", ["vector"], ["flat"])]
    inputs = [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", features])]
    last = np.zeros((features, WIDTH), np.float32)
    last[-1, 0] = 1.0
    return _publish(repository, name, VectorInput(features=features), inputs, nodes, last, ["above", "below"])


def publish_sides(repository: Path, name: str = "sides") -> Manifest:
    """A binary model: "right" where the last of two numbers is positive, else "left"."""
    return publish_head(repository, name, "binary", {"logits": [[0.0], [1.0]]}, labels=["left", "right"])


def publish_moods(repository: Path, name: str = "moods") -> Manifest:
    """A set of labels: "up" where the first of two numbers is positive, "wide" where the second is."""
    return publish_head(repository, name, "multi_label", {"logits": [[1.0, 0.0], [0.0, 1.0]]}, labels=["up", "wide"])


def publish_sums(repository: Path, name: str = "sums", interval: Interval | None = None) -> Manifest:
    """Two numbers: the sum of two, and their difference."""
    outputs = {"value": [[1.0, 1.0], [1.0, -1.0]]}
    return publish_head(repository, name, "regression", outputs, labels=["sum", "difference"], interval=interval)


def publish_spreads(repository: Path, name: str = "spreads") -> Manifest:
    """The first of two numbers, with the second for its deviation."""
    outputs = {"value": [[1.0], [0.0]], "deviation": [[0.0], [1.0]]}
    interval = Interval(method="gaussian", coverage=0.95, margins=[1.96])
    return publish_head(repository, name, "regression", outputs, labels=["first"], interval=interval)


def publish_heads(repository: Path, name: str = "heads") -> Manifest:
    """All of these kinds at once."""
    conformal = Interval(method="conformal", coverage=0.95, margins=[0.5])
    return publish_head(
        repository,
        name,
        "multi_task",
        {
            "logits_side": [[0.0], [1.0]],
            "logits_mood": [[1.0, 0.0], [0.0, 1.0]],
            "logits_place": [[0.0, 1.0, -1.0], [0.0, 0.0, 0.0]],
            "value_sum": [[1.0], [1.0]],
        },
        heads={
            "side": Head(task="binary", labels=["left", "right"]),
            "mood": Head(task="multi_label", labels=["up", "wide"]),
            "place": Head(task="classification", labels=["a", "b", "c"]),
            "sum": Head(task="regression", labels=["sum"], interval=conformal),
        },
    )


def publish_halves(repository: Path, name: str = "halves") -> Manifest:
    """An autoencoder of vectors of two numbers: the first comes back, the second is lost."""
    nodes = [
        helper.make_node("MatMul", ["vector", "first"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "back"], ["reconstruction"]),
        helper.make_node("Sub", ["vector", "reconstruction"], ["missing"]),
        helper.make_node("Mul", ["missing", "missing"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "axis"], ["error"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", 2])]
    outputs = [
        helper.make_tensor_value_info("reconstruction", TensorProto.FLOAT, ["batch", 2]),
        helper.make_tensor_value_info("error", TensorProto.FLOAT, ["batch"]),
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 1]),
    ]
    weights = [
        numpy_helper.from_array(np.float32([[1.0], [0.0]]), "first"),
        numpy_helper.from_array(np.float32([[1.0, 0.0]]), "back"),
        numpy_helper.from_array(np.array([1]), "axis"),
    ]
    graph = helper.make_graph(nodes, name, inputs, outputs, weights)
    return _write(repository, name, VectorInput(features=2), graph, task="reconstruction")


def publish_greys(repository: Path, name: str = "greys", size: int = 8) -> Manifest:
    """An autoencoder of images, whose code is the mean intensity of each colour: that is all that comes back."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers", "places"], ["means"], keepdims=1),
        helper.make_node("Sub", ["numbers", "means"], ["missing"]),
        helper.make_node("Mul", ["missing", "missing"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "axes"], ["error"], keepdims=0),
        helper.make_node("Squeeze", ["means", "places"], ["embedding"]),
        helper.make_node("Expand", ["means", "shape"], ["full"]),
        helper.make_node("Cast", ["full"], ["reconstruction"], to=TensorProto.UINT8),
    ]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", size, size, 3])]
    outputs = [
        helper.make_tensor_value_info("reconstruction", TensorProto.UINT8, ["batch", size, size, 3]),
        helper.make_tensor_value_info("error", TensorProto.FLOAT, ["batch"]),
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 3]),
    ]
    weights = [
        numpy_helper.from_array(np.array([1, 2]), "places"),
        numpy_helper.from_array(np.array([1, 2, 3]), "axes"),
        numpy_helper.from_array(np.array([1, size, size, 3]), "shape"),
    ]
    graph = helper.make_graph(nodes, name, inputs, outputs, weights)
    spec = ImageInput(height=size, width=size, resize="stretch", crop_fraction=1.0)
    return _write(repository, name, spec, graph, task="reconstruction")


def publish_head(
    repository: Path, name: str, task: str, outputs: dict[str, list[list[float]] | list[float]], **fields: Any
) -> Manifest:
    """A model of two numbers: each output is they times a matrix, or times a vector; the embedding is they."""
    nodes = [helper.make_node("MatMul", ["vector", f"{output}_matrix"], [output]) for output in outputs]
    nodes.append(helper.make_node("Identity", ["vector"], ["embedding"]))
    inputs = [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", 2])]
    shapes = {**{output: np.shape(matrix)[1:] for output, matrix in outputs.items()}, "embedding": (2,)}
    given = [helper.make_tensor_value_info(one, TensorProto.FLOAT, ["batch", *rest]) for one, rest in shapes.items()]
    weights = [
        numpy_helper.from_array(np.array(matrix, np.float32), f"{output}_matrix") for output, matrix in outputs.items()
    ]
    graph = helper.make_graph(nodes, name, inputs, given, weights)
    return _write(repository, name, VectorInput(features=2), graph, task=task, **fields)


def publish_constant(repository: Path, name: str, number: float, ballast: int = 0) -> Manifest:
    """A model that answers `number` whatever it is asked. ballast: bytes of weights that do nothing."""
    nodes = [
        helper.make_node("MatMul", ["vector", "nothing"], ["zero"]),
        helper.make_node("Add", ["zero", "number"], ["value"]),
    ]
    inputs = [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", 2])]
    outputs = [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["batch", 1])]
    weights = [
        numpy_helper.from_array(np.zeros((2, 1), np.float32), "nothing"),
        numpy_helper.from_array(np.float32([number]), "number"),
        numpy_helper.from_array(np.zeros(ballast, np.uint8), "ballast"),
    ]
    graph = helper.make_graph(nodes, name, inputs, outputs, weights)
    return _write(repository, name, VectorInput(features=2), graph, task="regression", labels=["number"])


def publish_series(repository: Path, name: str = "trends", channels: int = 2, max_length: int = 16) -> Manifest:
    """Two classes of series: "above" where the sum of the last channel is positive, else "below"."""
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["there"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["there", "axes"], ["kept"]),
        helper.make_node("Mul", ["series", "kept"], ["counted"]),
        helper.make_node("ReduceSum", ["counted", "axis_of_steps"], ["flat"], keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info("series", TensorProto.FLOAT, ["batch", "sequence", channels]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "sequence"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([2]), "axes"),
        numpy_helper.from_array(np.array([1]), "axis_of_steps"),
    ]
    last = np.zeros((channels, WIDTH), np.float32)
    last[-1, 0] = 1.0
    spec = SeriesInput(channels=channels, max_length=max_length)
    return _publish(repository, name, spec, inputs, nodes, last, ["above", "below"], constants)


def publish_images(repository: Path, name: str = "shades", size: int = 8) -> Manifest:
    """Two classes of images: "light" where the mean is above 127.5, else "dark"."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["numbers", "grey"], ["centred"]),
        helper.make_node("ReduceMean", ["centred", "axes"], ["flat"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", size, size, 3])]
    constants = [
        numpy_helper.from_array(np.float32(127.5), "grey"),
        numpy_helper.from_array(np.array([1, 2]), "axes"),
    ]
    mean = np.zeros((3, WIDTH), np.float32)
    mean[:, 0] = 1 / 3
    spec = ImageInput(height=size, width=size, resize="stretch", crop_fraction=1.0)
    return _publish(repository, name, spec, inputs, nodes, mean, ["light", "dark"], constants)


def publish_texts(repository: Path, name: str = "days", max_length: int = 16) -> Manifest:
    """Two classes of texts: "good" where the word occurs more often than "bad", else "bad"."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "day": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Cast", ["attention_mask"], ["there"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["there", "axes"], ["kept"]),
        helper.make_node("Mul", ["words", "kept"], ["counted"]),
        helper.make_node("ReduceSum", ["counted", "axes_of_words"], ["flat"], keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    table = np.array([[9, 9], [0, 1], [1, 0], [-1, 0], [0, 1]], np.float32)  # padding would be seen if it counted
    constants = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array([2]), "axes"),
        numpy_helper.from_array(np.array([1]), "axes_of_words"),
    ]
    matrix = np.zeros((2, WIDTH), np.float32)
    matrix[0, 0] = matrix[1, 1] = 1.0
    spec = TextInput(max_length=max_length)
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    return _publish(repository, name, spec, inputs, nodes, matrix, ["good", "bad"], constants, files)


def publish_generator(repository: Path, name: str = "shades-of-grey", *, beside: bool = False) -> Manifest:
    """Images of 6 x 4 pixels from 3 numbers: red, green and blue are 128 + 32 times one of them each, everywhere.

    beside: whether the graph stands beside another that reads vectors, as in a variational autoencoder.
    """
    matrix = 32.0 * np.tile(np.eye(3, dtype=np.float32), 24)
    nodes = [
        helper.make_node("MatMul", ["latent", "matrix"], ["centred"]),
        helper.make_node("Add", ["centred", "middle"], ["numbers"]),
        helper.make_node("Round", ["numbers"], ["whole"]),
        helper.make_node("Clip", ["whole", "least", "most"], ["clipped"]),
        helper.make_node("Cast", ["clipped"], ["flat"], to=TensorProto.UINT8),
        helper.make_node("Reshape", ["flat", "shape"], ["image"]),
    ]
    constants = [
        numpy_helper.from_array(matrix, "matrix"),
        *(
            numpy_helper.from_array(np.float32(value), named)
            for named, value in (("middle", 128), ("least", 0), ("most", 255))
        ),
        numpy_helper.from_array(np.array([-1, 4, 6, 3]), "shape"),
    ]
    inputs = [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["batch", 3])]
    outputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 4, 6, 3])]
    graph = helper.make_graph(nodes, name, inputs, outputs, constants)
    if not beside:
        spec = LatentInput(size=3, images=ImageInput(height=4, width=6))
        return _write(repository, name, spec, graph, task="generation")
    vectors = [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", 2])]
    nodes = [helper.make_node("MatMul", ["vector", "weights"], ["embedding"])]
    codes = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", WIDTH])]
    weights = [numpy_helper.from_array(np.ones((2, WIDTH), np.float32), "weights")]
    described = GraphSpec(inputs=[_tensor(value) for value in inputs], outputs=[_tensor(value) for value in outputs])
    return _write(
        repository,
        name,
        VectorInput(features=2),
        helper.make_graph(nodes, name, vectors, codes, weights),
        {"generator.onnx": _model(graph)},
        task="embedding",
        graphs={"generator": described},
    )


def _publish(
    repository: Path,
    name: str,
    spec: InputSpec,
    inputs: list[onnx.ValueInfoProto],
    nodes: list[onnx.NodeProto],
    matrix: np.ndarray,
    labels: list[str],
    constants: list[onnx.TensorProto] | None = None,
    files: dict[str, bytes] | None = None,
) -> Manifest:
    """flat · matrix is the embedding; its first number and its negative are the logits of the two labels."""
    head = np.zeros((WIDTH, 2), np.float32)
    head[0] = [1.0, -1.0]
    nodes = [
        *nodes,
        helper.make_node("MatMul", ["flat", "matrix"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "head"], ["logits"]),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2]),
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", WIDTH]),
    ]
    weights = [numpy_helper.from_array(matrix, "matrix"), numpy_helper.from_array(head, "head")]
    graph = helper.make_graph(nodes, name, inputs, outputs, [*weights, *(constants or [])])
    return _write(repository, name, spec, graph, files, task="classification", labels=labels)


def _write(
    repository: Path,
    name: str,
    spec: InputSpec,
    graph: onnx.GraphProto,
    files: dict[str, bytes] | None = None,
    **fields: Any,
) -> Manifest:
    with staging(repository) as folder:
        (folder / "model.onnx").write_bytes(_model(graph))
        for file, content in (files or {}).items():
            (folder / file).write_bytes(content)
        draft = Manifest(
            name=name,
            version=0,
            created_at=datetime.now(UTC),
            input=spec,
            inputs=[_tensor(value) for value in graph.input],
            outputs=[_tensor(value) for value in graph.output],
            model={"architecture": "mlp", "hyperparameters": {}},
            metrics={"accuracy": 1.0},
            parity=Parity(samples=1, largest_difference=0.0, tolerance=1e-4, top1_disagreements=0, batch_sizes=[1]),
            lineage=Lineage(base_model="mlp"),
            files={},
            **fields,
        )
        return publish(folder, repository, draft)


def _model(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    found: bytes = model.SerializeToString()
    return found


def _tensor(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
    return TensorSpec(name=value.name, dtype=TensorProto.DataType.Name(kind.elem_type).lower(), shape=shape, unit="1")
