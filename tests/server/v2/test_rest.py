"""What only REST has: JSON tensors in all their forms, binary ones behind it, compression, and the shape of errors."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from server.app import create_app
from server.settings import Settings, SettingsError
from tests.server.bundles import publish_vectors
from tests.server.chains import publish_language_model, publish_translation
from tests.server.conftest import Live, Start

POINTS = "/v2/models/points/infer"


def tensor(data: Any, shape: list[int], name: str = "vector", datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def infer(live: Live, model: str, *inputs: dict[str, Any], **more: Any) -> httpx.Response:
    return live.client.post(f"/v2/models/{model}/infer", json={"inputs": inputs, **more})


def outputs(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in response.json()["outputs"]}


def refused(response: httpx.Response, status: int = 400) -> str:
    """The message, in the shape that the protocol has."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert isinstance(body["error"], str)
    found: str = body["error"]
    return found


def binary(
    live: Live, path: str, described: dict[str, Any], *contents: bytes, length: int | None = None
) -> httpx.Response:
    text = json.dumps(described).encode()
    headers = {"inference-header-content-length": str(len(text) if length is None else length)}
    return live.client.post(path, content=text + b"".join(contents), headers=headers)


def sized(size: int, shape: list[int], name: str = "vector", datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}


@pytest.mark.parametrize("data", [[1, 2, 3, -4], [[1, 2], [3, -4]], [1.0, 2, 3.0, -4], [[1e0, 2.0], [3, -4]]])
def test_numbers_in_one_list_or_in_rows(live: Live, data: Any) -> None:
    assert outputs(infer(live, "points", tensor(data, [2, 2])))["logits"][:, 0].tolist() == [2.0, -4.0]


@pytest.mark.parametrize("data", ["[[0, %d]]", "[0, %d]", "[ [ 0 , %d.0e0 ] ]", "[-0,%d]"])
def test_numbers_are_their_own_in_every_request(live: Live, data: str) -> None:
    # What stands around them is remembered.
    for value in (1, 7, -3, 7):
        for more in ("", ', "parameters": {"x": [1, "]"]}', ', "id": "}[1]"'):
            one = '{"name": "vector", "shape": [1, 2], "datatype": "FP32", "data": %s}' % (data % value)
            body = '{"inputs": [' + one + "]" + more + "}"
            assert outputs(live.client.post(POINTS, content=body))["logits"][0, 0] == value
            last = '{"inputs": [{"data": %s, "datatype": "FP32", "shape": [1, 2], "name": "vector"}]}' % (data % value)
            assert outputs(live.client.post(POINTS, content=last))["logits"][0, 0] == value


def test_only_the_data_of_the_input_are_its_numbers(live: Live) -> None:
    aside = '{"parameters": {"data": [5, 6]}, "inputs": [{"name": "vector", "shape": [1, 2], "datatype": "FP32"%s}]}'
    assert "binary_data_size" in refused(live.client.post(POINTS, content=aside % ""))
    assert outputs(live.client.post(POINTS, content=aside % ', "data": [1, 2]'))["logits"][0, 0] == 2.0
    both = {**tensor([1, 2], [1, 2]), "parameters": {"binary_data_size": 8}}
    assert "left" in refused(infer(live, "points", both))
    assert "shares no memory" in refused(
        infer(live, "points", {**tensor([1, 2], [1, 2]), "parameters": {"shared_memory_region": "x"}})
    )


def test_float32_comes_and_goes_without_loss(live: Live) -> None:
    rows = np.random.default_rng(3).normal(size=(4, 2)).astype(np.float32)
    found = outputs(infer(live, "points", tensor(rows.tolist(), [4, 2])))["embedding"].astype(np.float32)
    np.testing.assert_array_equal(found[:, 0], rows[:, 1])


def test_token_ids_and_texts(live: Live) -> None:
    ids = tensor([[2, 4, 0], [3, 3, 3]], [2, 3], "input_ids", "INT64")
    mask = tensor([1, 1, 0, 1, 1, 1], [2, 3], "attention_mask", "INT64")
    assert outputs(infer(live, "days", ids, mask))["logits"][:, 0].tolist() == [1.0, -3.0]
    text = tensor(["good day", "bad"], [2], "text", "BYTES")
    assert outputs(infer(live, "days", text))["logits"][:, 0].tolist() == [1.0, -1.0]


def test_pixels(live: Live) -> None:
    pixels = np.full((1, 8, 8, 3), 255, np.uint8)
    flat = infer(live, "shades", tensor(pixels.ravel().tolist(), [1, 8, 8, 3], "pixels", "UINT8"))
    deep = infer(live, "shades", tensor(pixels.tolist(), [1, 8, 8, 3], "pixels", "UINT8"))
    assert outputs(flat)["logits"].tolist() == outputs(deep)["logits"].tolist()


@pytest.mark.parametrize(
    ("data", "shape", "words"),
    [
        ([1, 2, 3], [2, 2], "3 elements"),
        ([[1, 2, 3], [4]], [2, 2], "not of shape"),
        ([[1, 2]], [2, 2], "not of shape"),
        ([[[1, 2]]], [1, 2], "as deep as"),
        (["1", "2"], [1, 2], "no FP32"),
        ([True, False], [1, 2], "no FP32"),
        ([None, 1], [1, 2], "no FP32"),
        (7, [1, 2], "as deep as"),
        ([1e39, 0], [1, 2], "finite"),
        ([1, 2], [1, 3], "[-1, 2]"),
        ([1, 2], [-1, 2], "[-1, 2]"),
        ([], [0, 2], "[-1, 2]"),
        ([1, 2], [2], "[-1, 2]"),
    ],
)
def test_data_that_do_not_fit(live: Live, data: Any, shape: list[int], words: str) -> None:
    assert words in refused(infer(live, "points", tensor(data, shape)))


def test_integers_out_of_range(live: Live) -> None:
    for value in (256, -1):
        assert "pixels" in refused(infer(live, "shades", tensor([value] * 192, [1, 8, 8, 3], "pixels", "UINT8")))
    assert refused(infer(live, "days", tensor([2**63], [1, 1], "input_ids", "INT64")))


def test_bodies_that_are_no_request(live: Live) -> None:
    for body in (b"[]", b"{", b"null", b'{"inputs": 3}', b'{"inputs": [{"name": "vector"}]}', b"\xff", b"{}"):
        assert refused(live.client.post(POINTS, content=body))
    assert "empty" in refused(live.client.post(POINTS, content=b""))
    assert "'vector' is missing" in refused(infer(live, "points"))
    assert "twice" in refused(infer(live, "points", *[tensor([1, 2], [1, 2])] * 2))
    no_data = {"name": "vector", "shape": [1, 2], "datatype": "FP32"}
    assert "binary_data_size" in refused(infer(live, "points", no_data))


def test_unknown_parameters_are_passed_over(live: Live) -> None:
    one = {**tensor([1, 2], [1, 2]), "parameters": {"content_type": "np"}}
    assert outputs(infer(live, "points", one, parameters={"mine": 3}))


def test_binary_in_and_out(live: Live) -> None:
    rows = np.float32([[1, 2], [3, -4]])
    described = {"inputs": [sized(16, [2, 2])], "outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}
    for _ in range(2):  # the second is remembered
        response = binary(live, POINTS, described, rows.tobytes())
        assert response.headers["content-type"] == "application/octet-stream"
        length = int(response.headers["inference-header-content-length"])
        (one,) = json.loads(response.content[:length])["outputs"]
        assert one == {
            "name": "logits",
            "datatype": "FP32",
            "shape": [2, 2],
            "parameters": {"binary_data_size": 16},
        }
        assert np.frombuffer(response.content[length:], np.float32).tolist() == [2, -2, -4, 4]
        rows = rows[::-1].copy() if rows[0, 0] != 1 else rows
    three = {**described, "inputs": [sized(24, [3, 2])]}
    response = binary(live, POINTS, three, np.ones((3, 2), np.float32).tobytes())
    assert len(response.content) - int(response.headers["inference-header-content-length"]) == 24


def test_binary_and_json_mixed(live: Live) -> None:
    ids = np.array([[2, 2, 0]])
    described = {
        "inputs": [sized(24, [1, 3], "input_ids", "INT64"), tensor([1, 1, 0], [1, 3], "attention_mask", "INT64")],
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "logits", "parameters": {"binary_data": False}}, {"name": "embedding"}],
    }
    response = binary(live, "/v2/models/days/infer", described, ids.tobytes())
    length = int(response.headers["inference-header-content-length"])
    first, second = json.loads(response.content[:length])["outputs"]
    assert first["data"] == [2.0, -2.0]
    assert second["parameters"]["binary_data_size"] == len(response.content) - length == 16


def test_bytes_in_binary(live: Live) -> None:
    texts = [b"good day", b"bad"]
    content = b"".join(len(one).to_bytes(4, "little") + one for one in texts)
    described = {"inputs": [sized(len(content), [2], "text", "BYTES")]}
    response = binary(live, "/v2/models/days/infer", described, content)
    assert outputs(response)["logits"][:, 0].tolist() == [1.0, -1.0]
    for broken in (content[:-1], content + b"x", content[4:], b"\xff\xff\xff\xff" + content[4:]):
        described = {"inputs": [sized(len(broken), [2], "text", "BYTES")]}
        assert "elements" in refused(binary(live, "/v2/models/days/infer", described, broken))


def test_sizes_that_do_not_add_up(live: Live) -> None:
    row = np.ones((1, 2), np.float32).tobytes()
    assert "8" in refused(binary(live, POINTS, {"inputs": [sized(4, [1, 2])]}, row[:4]))
    assert "left" in refused(binary(live, POINTS, {"inputs": [sized(8, [1, 2])]}, row[:4]))
    assert "left" in refused(binary(live, POINTS, {"inputs": [sized(-8, [1, 2])]}, row))
    assert "belong to no input" in refused(binary(live, POINTS, {"inputs": [sized(8, [1, 2])]}, row, b"more"))
    described = {"inputs": [sized(8, [1, 2])]}
    assert "has" in refused(binary(live, POINTS, described, row, length=10_000))
    assert refused(binary(live, POINTS, described, row, length=7))
    response = live.client.post(POINTS, content=row, headers={"inference-header-content-length": "many"})
    assert "many" in refused(response)


def nothing_but(live: Live, model: str, content: bytes) -> httpx.Response:
    return live.client.post(
        f"/v2/models/{model}/infer", content=content, headers={"inference-header-content-length": "0"}
    )


def test_a_body_of_one_input_alone(live: Live) -> None:
    def first(response: httpx.Response) -> np.ndarray:
        assert response.status_code == 200, response.text
        length = int(response.headers["inference-header-content-length"])
        one = json.loads(response.content[:length])["outputs"][0]
        size = one["parameters"]["binary_data_size"]
        return np.frombuffer(response.content[length : length + size], np.float32).reshape(one["shape"])

    assert first(nothing_but(live, "points", np.float32([[1, 2], [3, 4]]).tobytes())).shape == (2, 2)
    assert first(nothing_but(live, "days", b"good good day"))[0, 0] == 2.0
    assert first(nothing_but(live, "trends", np.float32([[1, 2], [3, 4]]).tobytes()))[0, 0] == 6.0
    pixels = np.full((8, 8, 3), 255, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    np.testing.assert_array_equal(
        first(nothing_but(live, "shades", pixels.tobytes())), first(nothing_but(live, "shades", stream.getvalue()))
    )
    assert "whole number of rows" in refused(nothing_but(live, "points", b"12345"))


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_a_compressed_body(live: Live, packing: str) -> None:
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[packing]
    body = json.dumps({"inputs": [tensor([1, 2], [1, 2])]}).encode()
    headers = {"content-encoding": packing}
    assert outputs(live.client.post(POINTS, content=pack(body), headers=headers))
    assert "unpacked" in refused(live.client.post(POINTS, content=b"nothing of the kind", headers=headers))
    assert "too soon" in refused(live.client.post(POINTS, content=pack(body)[:-6], headers=headers))


def test_compression_that_nobody_reads(live: Live) -> None:
    assert "gzip" in refused(live.client.post(POINTS, content=b"{}", headers={"content-encoding": "br"}), 415)


def test_a_body_that_unpacks_to_more_than_is_taken(start: Start, tmp_path: Path) -> None:
    publish_vectors(tmp_path / "repository")
    live = start(max_body_bytes=10_000)
    body = gzip.compress(b" " * 1_000_000)
    refused(live.client.post(POINTS, content=body, headers={"content-encoding": "gzip"}), 413)
    refused(live.client.post(POINTS, content=b" " * 20_000), 413)


def test_errors_have_the_protocol_s_shape_everywhere(live: Live) -> None:
    assert "nothing" in refused(live.client.get("/v2/models/nothing"), 404)
    assert refused(live.client.get("/v2/nowhere"), 404)
    assert refused(live.client.get(POINTS), 405)
    assert refused(live.client.post("/v2/models/points"), 405)
    assert refused(live.client.post("/v2/repository/index", content=b"{"))
    assert refused(infer(live, "nothing", tensor([1, 2], [1, 2])), 404)
    assert refused(infer(live, "points/versions/3", tensor([1, 2], [1, 2])), 404)
    late = live.client.post(
        POINTS,
        json={"inputs": [tensor([1, 2], [1, 2])]},
        headers={"x-request-timeout": "0.0000001"},
    )
    assert late.status_code in (408, 429)
    assert isinstance(late.json()["error"], str)


def test_not_ready_is_told_by_the_status(live: Live) -> None:
    assert live.client.get("/v2/health/live").json() == {"live": True}
    assert live.client.get("/v2/health/ready").json() == {"ready": True}
    assert live.client.get("/v2/models/points/ready").json() == {"name": "points", "ready": True}
    response = live.client.get("/v2/models/points/versions/9/ready")
    assert (response.status_code, response.json()["ready"]) == (404, False)


def test_names_may_be_encoded(live: Live) -> None:
    assert outputs(infer(live, "shades%2Dof%2Dgrey", tensor([0, 0, 0], [1, 3], "latent"), outputs=[{"name": "image"}]))


def test_an_alias_is_a_name(start: Start, tmp_path: Path) -> None:
    publish_vectors(tmp_path / "repository")
    publish_vectors(tmp_path / "repository")
    (tmp_path / "repository" / "points" / "deployment.json").write_text('{"aliases": {"production": 1}}')
    live = start()
    response = infer(live, "points@production", tensor([1, 2], [1, 2]))
    assert response.json()["model_version"] == "1"
    assert infer(live, "points", tensor([1, 2], [1, 2])).json()["model_version"] == "2"
    assert live.client.get("/v2/models/points@production").json()["versions"] == ["1", "2"]
    assert live.client.get("/v2/models/points@staging/ready").status_code == 404


def test_a_language_model_names_its_routes(start: Start, tmp_path: Path) -> None:
    publish_language_model(tmp_path / "repository", "chain")
    publish_translation(tmp_path / "repository", "german")
    live = start()
    for name in ("chain", "german"):
        assert "/v1/completions" in refused(infer(live, name, tensor([1, 2], [1, 2])))
    assert live.client.get("/v2/models/chain").json()["name"] == "chain"
    assert live.client.get("/v2/models/chain/config").status_code == 200


def test_nothing_is_seen_of_what_another_has_sent(live: Live) -> None:
    described = {"inputs": [sized(8, [1, 2])], "parameters": {"binary_data_output": True}}
    for value in (1.0, 5.0, 3.0):
        response = binary(live, POINTS, described, np.float32([[0, value]]).tobytes())
        length = int(response.headers["inference-header-content-length"])
        assert np.frombuffer(response.content[length:], np.float32)[0] == value
    # The same beginning at another model is another request.
    response = binary(live, "/v2/models/heads/infer", described, np.float32([[0, 1]]).tobytes())
    length = int(response.headers["inference-header-content-length"])
    assert json.loads(response.content[:length])["model_name"] == "heads"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)
INPUTS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["vector", "input_ids", "attention_mask", "text", "pixels", "image", "series", "?"]),
        "shape": st.lists(st.integers(-2, 5) | st.just(2**62), max_size=4) | st.just([1, 2]) | st.just([2, 3]),
        "datatype": st.sampled_from(["FP32", "INT64", "UINT8", "BYTES", "FP16", "BOOL", "FP64", "BF16", ""]),
    },
    optional={
        "data": VALUES | st.just([1, 2]) | st.just([[1, 1, 0], [1, 0, 0]]),
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 40) | VALUES}),
    },
)
REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(INPUTS, max_size=3)},
    optional={
        "id": VALUES,
        "parameters": st.dictionaries(
            st.sampled_from(["priority", "timeout", "binary_data_output", "sequence_id", "x"]), VALUES
        ),
        "outputs": st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["logits", "embedding", "image", "?"])},
                optional={"parameters": st.dictionaries(st.sampled_from(["classification", "binary_data"]), VALUES)},
            ),
            max_size=3,
        ),
    },
)
MODELS = st.sampled_from(["points", "days", "shades", "trends", "shades-of-grey", "heads"])


@settings(max_examples=120, deadline=None)
@given(model=MODELS, request=REQUESTS, contents=st.binary(max_size=48), off=st.integers(-3, 3) | st.just(0))
def test_no_request_breaks_the_server(
    live: Live, model: str, request: dict[str, Any], contents: bytes, off: int
) -> None:
    text = json.dumps(request).encode()
    for headers in ({}, {"inference-header-content-length": str(max(0, len(text) + off))}):
        response = live.client.post(
            f"/v2/models/{model}/infer", content=text + contents * bool(headers), headers=headers
        )
        assert response.status_code < 500, response.text
        if response.status_code != 200:
            refused(response, response.status_code)


@settings(max_examples=150, deadline=None)
@given(model=MODELS, body=st.binary(min_size=1, max_size=200), length=st.integers(0, 250))
def test_no_bytes_break_the_server(live: Live, model: str, body: bytes, length: int) -> None:
    headers = {"inference-header-content-length": str(length)}
    response = live.client.post(f"/v2/models/{model}/infer", content=body, headers=headers)
    assert response.status_code < 500, response.text


def test_a_version_that_is_damaged_is_told_of(start: Start, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish_vectors(repository)
    publish_vectors(repository, "broken")
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"not any more")
    live = start()
    (entry,) = [one for one in live.client.post("/v2/repository/index").json() if one["name"] == "broken"]
    assert (entry["version"], entry["state"]) == ("1", "UNAVAILABLE")
    assert "sha256" in entry["reason"]
    ready = live.client.post("/v2/repository/index", json={"ready": True}).json()
    assert [(one["name"], one["state"]) for one in ready] == [("points", "READY")]
    assert "sha256" in refused(live.client.post("/v2/repository/models/broken/load"), 503)


def test_a_lazy_model_is_loaded_by_the_first_who_asks(start: Start, tmp_path: Path) -> None:
    publish_vectors(tmp_path / "repository")
    (tmp_path / "repository" / "points" / "deployment.json").write_text('{"lazy": true}')
    live = start()
    assert live.client.get("/v2/models/points/ready").status_code == 200
    assert outputs(infer(live, "points", tensor([1, 2], [1, 2])))["logits"].tolist() == [[2.0, -2.0]]


def test_the_cache_is_in_the_statistics(start: Start, tmp_path: Path) -> None:
    publish_vectors(tmp_path / "repository")
    cache = '{"cache": {"ttl_seconds": 60, "max_bytes": 1000000}}'
    (tmp_path / "repository" / "points" / "deployment.json").write_text(cache)
    live = start()
    for _ in range(3):
        assert outputs(infer(live, "points", tensor([1, 2], [1, 2])))["logits"].tolist() == [[2.0, -2.0]]
    assert live.client.get("/v2/models/points/config").json()["response_cache"] == {"enable": True}
    (found,) = live.client.get("/v2/models/points/stats").json()["model_stats"]
    counts = {name: one["count"] for name, one in found["inference_stats"].items()}
    assert (counts["success"], counts["cache_hit"], counts["cache_miss"], counts["compute_infer"]) == (3, 2, 1, 1)


def test_a_start_without_grpc_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "grpc" else find(name, *rest))
    with pytest.raises(SettingsError, match=r"espalier\[grpc\]"):
        create_app(Settings(home=tmp_path, grpc_port=0))
