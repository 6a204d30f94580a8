"""Triton's own clients, over REST and over gRPC, against the real server: both get the same answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.server.conftest import Live


class Side:
    """One of the two protocols: the client, and the module that its tensors come from."""

    def __init__(self, module: ModuleType, client: Any) -> None:
        self.module, self.client = module, client
        self.over_rest = module is tritonclient.http

    def infer(
        self,
        model: str,
        inputs: dict[str, np.ndarray],
        outputs: Sequence[Any] | None = None,
        **options: Any,
    ) -> Any:
        tensors = []
        for name, array in inputs.items():
            tensor = self.module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        return self.client.infer(model, tensors, outputs=outputs, **options)

    def output(self, name: str, **options: Any) -> Any:
        return self.module.InferRequestedOutput(name, **options)


@pytest.fixture(params=["rest", "grpc"])
def side(request: pytest.FixtureRequest, live: Live) -> Side:
    if request.param == "rest":
        return Side(tritonclient.http, request.getfixturevalue("rest"))
    return Side(tritonclient.grpc, request.getfixturevalue("calls"))


POINTS = np.float32([[1.0, 2.0], [3.0, -4.0], [0.5, 0.25]])


def message(raised: pytest.ExceptionInfo[InferenceServerException]) -> str:
    found: str = raised.value.message()
    return found


def status(raised: pytest.ExceptionInfo[InferenceServerException]) -> str:
    found: str = raised.value.status()
    return found


def test_the_server_is_live_and_ready(side: Side) -> None:
    assert side.client.is_server_live()
    assert side.client.is_server_ready()
    assert side.client.is_model_ready("points")
    assert side.client.is_model_ready("points", "1")
    assert not side.client.is_model_ready("points", "2")
    assert not side.client.is_model_ready("nothing")


def test_metadata_of_the_server(side: Side) -> None:
    found = side.client.get_server_metadata(**({} if side.over_rest else {"as_json": True}))
    assert found["name"] == "espalier"
    assert {"classification", "statistics", "model_repository"} <= set(found["extensions"])
    assert ("binary_tensor_data" in found["extensions"]) == side.over_rest
    assert not [one for one in found["extensions"] if "shared_memory" in one or "trac" in one or "logging" in one]


def integers(values: Sequence[Any]) -> list[int]:
    return [int(value) for value in values]


def test_metadata_of_a_model(side: Side) -> None:
    found = side.client.get_model_metadata("points", **({} if side.over_rest else {"as_json": True}))
    assert (found["name"], found["versions"], found["platform"]) == ("points", ["1"], "onnxruntime_onnx")
    (tensor,) = found["inputs"]
    assert (tensor["name"], tensor["datatype"], integers(tensor["shape"])) == ("vector", "FP32", [-1, 2])
    assert [(one["name"], integers(one["shape"])) for one in found["outputs"]] == [
        ("logits", [-1, 2]),
        ("embedding", [-1, 4]),
    ]


def test_metadata_names_the_inputs_that_the_server_decodes(side: Side) -> None:
    options = {} if side.over_rest else {"as_json": True}
    texts = {one["name"]: one["datatype"] for one in side.client.get_model_metadata("days", **options)["inputs"]}
    assert texts == {"input_ids": "INT64", "attention_mask": "INT64", "text": "BYTES"}
    images = {one["name"]: one["datatype"] for one in side.client.get_model_metadata("shades", **options)["inputs"]}
    assert images == {"pixels": "UINT8", "image": "BYTES"}


def test_configuration(side: Side) -> None:
    found = side.client.get_model_config("days", **({} if side.over_rest else {"as_json": True}))
    found = found if side.over_rest else found["config"]
    assert (found["name"], found["backend"], found["max_batch_size"]) == ("days", "onnxruntime", 64)
    inputs = {one["name"]: one for one in found["input"]}
    assert inputs["input_ids"]["data_type"] == "TYPE_INT64"
    assert integers(inputs["input_ids"]["dims"]) == [-1]
    assert inputs["text"]["data_type"] == "TYPE_STRING"
    assert {name for name, one in inputs.items() if one.get("optional")} == {"attention_mask", "text"}
    assert int(found["version_policy"]["latest"]["num_versions"]) == 1
    assert int(found["dynamic_batching"]["priority_levels"]) == 7
    assert found["instance_group"][0]["kind"] == "KIND_CPU"


def test_inference(side: Side) -> None:
    found = side.infer("points", {"vector": POINTS}, request_id="mine")
    assert found.as_numpy("logits").dtype == np.float32
    np.testing.assert_array_equal(found.as_numpy("logits"), [[2, -2], [-4, 4], [0.25, -0.25]])
    assert found.as_numpy("embedding").shape == (3, 4)
    response = found.get_response() if side.over_rest else found.get_response(as_json=True)
    assert response["id"] == "mine"
    assert (response["model_name"], response["model_version"]) == ("points", "1")


def test_a_version_can_be_named(side: Side) -> None:
    assert side.infer("points", {"vector": POINTS}, model_version="1").as_numpy("logits").shape == (3, 2)
    with pytest.raises(InferenceServerException) as raised:
        side.infer("points", {"vector": POINTS}, model_version="7")
    assert status(raised) in ("404", "StatusCode.NOT_FOUND")


def test_outputs_are_selected_in_the_order_asked_for(side: Side) -> None:
    found = side.infer("points", {"vector": POINTS}, [side.output("embedding")])
    assert found.as_numpy("logits") is None
    assert found.as_numpy("embedding").shape == (3, 4)


def test_classification(side: Side) -> None:
    found = side.infer("points", {"vector": POINTS}, [side.output("logits", class_count=1)]).as_numpy("logits")
    assert found.tolist() == [[b"2.000000:0:above"], [b"4.000000:1:below"], [b"0.250000:0:above"]]
    found = side.infer("points", {"vector": POINTS[:1]}, [side.output("logits", class_count=9)]).as_numpy("logits")
    assert found.tolist() == [[b"2.000000:0:above", b"-2.000000:1:below"]]


def test_classification_of_heads(side: Side) -> None:
    outputs = [side.output("logits_side", class_count=1), side.output("logits_place", class_count=2)]
    found = side.infer("heads", {"vector": np.float32([[2.0, -1.0]])}, outputs)
    assert found.as_numpy("logits_side").tolist() == [[b"-1.000000:0:right"]]
    assert found.as_numpy("logits_place").tolist() == [[b"2.000000:1:b", b"0.000000:0:a"]]


def test_texts_as_tokens(side: Side) -> None:
    ids = np.array([[2, 4, 0, 0], [3, 3, 4, 2]])
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = side.infer("days", {"input_ids": ids, "attention_mask": mask}).as_numpy("logits")
    assert found[:, 0].tolist() == [1.0, -1.0]


def test_without_a_mask_nothing_is_padding(side: Side) -> None:
    assert side.infer("days", {"input_ids": np.array([[2, 2, 4]])}).as_numpy("logits")[0, 0] == 2.0


def test_texts_as_texts(side: Side) -> None:
    texts = np.array([b"good day", b"bad bad day"], np.object_)
    found = side.infer("days", {"text": texts}).as_numpy("logits")
    assert found[:, 0].tolist() == [1.0, -2.0]
    assert side.infer("days", {"text": texts[:, None]}).as_numpy("logits").tolist() == found.tolist()


def test_pixels_and_image_files(side: Side) -> None:
    pixels = np.full((2, 8, 8, 3), 200, np.uint8)
    pixels[1] = 7
    raw = side.infer("shades", {"pixels": pixels}).as_numpy("logits")
    files = []
    for one in pixels:
        stream = io.BytesIO()
        Image.fromarray(one).save(stream, "PNG")
        files.append(stream.getvalue())
    decoded = side.infer("shades", {"image": np.array(files, np.object_)}).as_numpy("logits")
    np.testing.assert_array_equal(raw, decoded)
    assert (raw[0, 0] > 0) > (raw[1, 0] > 0)


def test_series(side: Side) -> None:
    series = np.float32([[[1, 2], [3, 4], [9, 9]], [[1, -2], [1, -2], [1, -2]]])
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    found = side.infer("trends", {"series": series, "attention_mask": mask}).as_numpy("logits")
    assert found[:, 0].tolist() == [6.0, -6.0]


def test_noise_to_images(side: Side) -> None:
    found = side.infer("shades-of-grey", {"latent": np.float32([[0, 1, -1]])}).as_numpy("image")
    assert (found.dtype, found.shape) == (np.uint8, (1, 4, 6, 3))
    assert found[0, 0, 0].tolist() == [128, 160, 96]


def test_an_autoencoder_gives_all_its_tensors(side: Side) -> None:
    pixels = np.full((1, 8, 8, 3), 90, np.uint8)
    found = side.infer("greys", {"pixels": pixels})
    np.testing.assert_array_equal(found.as_numpy("reconstruction"), pixels)
    assert found.as_numpy("error").shape == (1,)


def test_priority_and_timeout(side: Side) -> None:
    for level in (0, 1, 4, 7):
        found = side.infer("points", {"vector": POINTS}, priority=level, timeout=5_000_000)
        assert found.as_numpy("logits").shape == (3, 2)
    with pytest.raises(InferenceServerException, match="priority"):
        side.infer("points", {"vector": POINTS}, priority=8)


def refused(side: Side, model: str, inputs: dict[str, np.ndarray], outputs: Any = None, **options: Any) -> str:
    """Why: what the client did is wrong."""
    with pytest.raises(InferenceServerException) as raised:
        side.infer(model, inputs, outputs, **options)
    assert status(raised) in ("400", "StatusCode.INVALID_ARGUMENT")
    return message(raised)


def test_what_is_wrong_is_said(side: Side) -> None:
    assert "'points'" not in refused(side, "points", {"vecto": POINTS})
    assert "'vecto'" in refused(side, "points", {"vecto": POINTS})
    assert "FP32, not FP64" in refused(side, "points", {"vector": POINTS.astype(np.float64)})
    assert "[-1, 2]" in refused(side, "points", {"vector": POINTS[:, :1]})
    assert "'chances'" in refused(side, "points", {"vector": POINTS}, [side.output("chances")])
    assert "finite" in refused(side, "points", {"vector": np.float32([[np.nan, 1]])})
    assert "token ids run from 0 to 4" in refused(side, "days", {"input_ids": np.array([[2, 5]])})
    assert "'input_ids' is missing, or 'text'" in refused(
        side, "days", {"attention_mask": np.array([[1, 1]], np.int64)}
    )
    gap = {"input_ids": np.array([[2, 3, 4]]), "attention_mask": np.array([[1, 0, 1]])}
    assert "attention_mask, row 0" in refused(side, "days", gap)
    assert "at most 16" in refused(side, "days", {"input_ids": np.full((1, 17), 2)})
    assert "sequence_id" in refused(side, "points", {"vector": POINTS}, sequence_id=5)
    assert "1024" in refused(side, "points", {"vector": np.ones((1025, 2), np.float32)})
    assert "scores" in refused(
        side, "greys", {"pixels": np.zeros((1, 8, 8, 3), np.uint8)}, [side.output("error", class_count=1)]
    )


def test_a_model_that_is_not_there(side: Side) -> None:
    for ask in (
        lambda: side.infer("nothing", {"vector": POINTS}),
        lambda: side.client.get_model_metadata("nothing"),
        lambda: side.client.get_model_config("nothing"),
        lambda: side.client.get_inference_statistics("nothing"),
        lambda: side.client.load_model("nothing"),
        lambda: side.client.unload_model("nothing"),
    ):
        with pytest.raises(InferenceServerException) as raised:
            ask()
        assert status(raised) in ("404", "StatusCode.NOT_FOUND")
        assert "nothing" in message(raised)


def test_statistics(side: Side) -> None:
    def counts() -> dict[str, Any]:
        options = {} if side.over_rest else {"as_json": True}
        (found,) = side.client.get_inference_statistics("sides", **options)["model_stats"]
        return found

    def count(found: dict[str, Any], name: str) -> int:
        return int(found["inference_stats"].get(name, {}).get("count", 0))

    before = counts()
    for rows in (1, 3):
        side.infer("sides", {"vector": np.ones((rows, 2), np.float32)})
    refused(side, "sides", {"vector": np.ones((1, 3), np.float32)})
    after = counts()
    assert int(after["inference_count"]) - int(before.get("inference_count", 0)) == 4
    assert int(after["execution_count"]) - int(before.get("execution_count", 0)) == 2
    for name, more in {"success": 2, "fail": 1, "queue": 2, "compute_infer": 2, "compute_output": 2}.items():
        assert count(after, name) - count(before, name) == more
        assert int(after["inference_stats"][name]["ns"]) > 0
    assert {1, 3} <= {int(one["batch_size"]) for one in after["batch_stats"]}
    assert int(after["last_inference"]) > 1.7e12


def test_index(side: Side) -> None:
    found = side.client.get_model_repository_index(**({} if side.over_rest else {"as_json": True}))
    models = found if side.over_rest else found["models"]
    assert {"name": "points", "version": "1", "state": "READY"}.items() <= next(
        one for one in models if one["name"] == "points"
    ).items()


def test_load_and_unload(side: Side, live: Live) -> None:
    side.client.unload_model("heads", unload_dependents=True)
    assert not side.client.is_model_ready("heads")
    with pytest.raises(InferenceServerException):
        side.infer("heads", {"vector": POINTS})
    side.client.load_model("heads")
    assert side.client.is_model_ready("heads")
    assert side.infer("heads", {"vector": POINTS}).as_numpy("value_sum").tolist() == [[3.0], [-1.0], [0.75]]


def test_a_model_is_loaded_as_it_was_published(side: Side) -> None:
    with pytest.raises(InferenceServerException, match="deployment"):
        side.client.load_model("points", config='{"max_batch_size": 3}')


def test_what_is_not_offered_is_refused(side: Side) -> None:
    for ask in (
        lambda: side.client.get_trace_settings(),
        lambda: side.client.get_log_settings(),
        lambda: side.client.get_system_shared_memory_status(),
        lambda: side.client.register_system_shared_memory("region", "/key", 64),
        lambda: side.client.get_cuda_shared_memory_status(),
    ):
        with pytest.raises(InferenceServerException) as raised:
            ask()
        assert status(raised) in ("404", "StatusCode.UNIMPLEMENTED")
    tensor = side.module.InferInput("vector", [1, 2], "FP32")
    tensor.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException, match="shares no memory"):
        side.client.infer("points", [tensor])


def test_both_protocols_and_v1_answer_alike(live: Live, rest: Any, calls: Any) -> None:
    sides = [Side(tritonclient.http, rest), Side(tritonclient.grpc, calls)]
    rows = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    first, second = (one.infer("points", {"vector": rows}).as_numpy("logits") for one in sides)
    as_json = live.client.post(
        "/v2/models/points/infer",
        json={"inputs": [{"name": "vector", "shape": [5, 2], "datatype": "FP32", "data": rows.tolist()}]},
    ).json()
    third = np.float32(as_json["outputs"][0]["data"]).reshape(as_json["outputs"][0]["shape"])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)
    classified: httpx.Response = live.client.post("/v1/classify", json={"model": "points", "input": rows.tolist()})
    for row, one in zip(first, classified.json()["data"], strict=True):
        odds = np.exp(row - row.max())
        top = {entry["index"]: entry["probability"] for entry in one["top"]}
        np.testing.assert_allclose([top[0], top[1]], odds / odds.sum(), rtol=1e-5)
    text = np.array([b"good day"], np.object_)
    ids = np.array([[2, 4]])
    found = {str(one.infer("days", {"text": text}).as_numpy("logits").tolist()) for one in sides}
    found |= {str(one.infer("days", {"input_ids": ids}).as_numpy("logits").tolist()) for one in sides}
    assert len(found) == 1
