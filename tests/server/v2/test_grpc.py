"""What only gRPC has: streams, contents by type, deadlines, keys, health, metrics and how it stops."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from finetune.jobs.store import JobStore
from server.grpc import health_pb2
from server.keys import KeyStore, Limits, Scope
from server.settings import Settings
from tests.server.bundles import publish_vectors
from tests.server.conftest import Live, Start

POINTS = np.float32([[1.0, 2.0], [3.0, -4.0]])


def address(live: Live) -> str:
    return f"127.0.0.1:{live.server.application.state.grpc_port}"


def points(rows: np.ndarray = POINTS) -> tritonclient.grpc.InferInput:
    tensor = tritonclient.grpc.InferInput("vector", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    return tensor


@pytest.fixture(scope="module")
def channel(live: Live) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address(live)) as found:
        yield found


def infer(channel: grpc.Channel, request: Any) -> Any:
    method = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )
    return method(request)


def typed(name: str, datatype: str, shape: list[int], **contents: Any) -> Any:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    tensor.contents.MergeFrom(service_pb2.InferTensorContents(**contents))
    return tensor


def test_contents_by_their_type(channel: grpc.Channel) -> None:
    def first_logit(model: str, *inputs: Any) -> float:
        answer = infer(channel, service_pb2.ModelInferRequest(model_name=model, inputs=inputs))
        return float(np.frombuffer(answer.raw_output_contents[0], np.float32)[0])

    assert first_logit("points", typed("vector", "FP32", [1, 2], fp32_contents=[5, -3])) == -3.0
    assert first_logit("days", typed("text", "BYTES", [1], bytes_contents=[b"good day"])) == 1.0
    ids = typed("input_ids", "INT64", [1, 3], int64_contents=[3, 3, 0])
    mask = typed("attention_mask", "INT64", [1, 3], int64_contents=[1, 1, 0])
    assert first_logit("days", ids, mask) == -2.0
    assert first_logit("shades", typed("pixels", "UINT8", [1, 8, 8, 3], uint_contents=[255] * 192)) > 0


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (typed("vector", "FP32", [1, 2], fp32_contents=[5]), "1 elements"),
        (typed("vector", "FP32", [1, 2], fp64_contents=[5, 1]), "0 elements"),
        (typed("vector", "FP16", [1, 2]), "not FP16"),
        (typed("pixels", "UINT8", [1, 8, 8, 3], uint_contents=[256] * 192), "no input 'pixels'"),
    ],
)
def test_contents_that_do_not_fit(channel: grpc.Channel, tensor: Any, words: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        infer(channel, service_pb2.ModelInferRequest(model_name="points", inputs=[tensor]))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in raised.value.details()


def test_integers_out_of_range_are_refused(channel: grpc.Channel) -> None:
    tensor = typed("pixels", "UINT8", [1, 8, 8, 3], uint_contents=[256] * 192)
    with pytest.raises(grpc.RpcError) as raised:
        infer(channel, service_pb2.ModelInferRequest(model_name="shades", inputs=[tensor]))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_raw_contents_without_an_input_are_refused(channel: grpc.Channel) -> None:
    request = service_pb2.ModelInferRequest(model_name="points", raw_input_contents=[b"1234", b"5678"])
    request.inputs.add(name="vector", datatype="FP32", shape=[1, 2])
    with pytest.raises(grpc.RpcError) as raised:
        infer(channel, request)
    assert "2 entries for 1 inputs" in raised.value.details()


def test_a_deadline_that_has_passed(channel: grpc.Channel) -> None:
    request = service_pb2.ModelInferRequest(model_name="points")
    request.inputs.add(name="vector", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(POINTS[:1].tobytes())
    request.parameters["timeout"].int64_param = 1
    with pytest.raises(grpc.RpcError) as raised:
        infer(channel, request)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_stream_answers_in_order_and_outlives_a_mistake(live: Live) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(address(live)) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for i in range(20):
            model = "nothing" if i == 7 else "points"
            client.async_stream_infer(model, [points(np.float32([[0, i]]))], request_id=str(i))
        found = [answers.get(timeout=20) for _ in range(20)]
        client.stop_stream()
    for i, (result, error) in enumerate(found):
        if i == 7:
            assert isinstance(error, InferenceServerException)
            assert "nothing" in error.message()
        else:
            assert error is None
            assert result.get_response().id == str(i)
            assert result.as_numpy("logits")[0, 0] == i


def test_health_as_grpc_has_it(channel: grpc.Channel) -> None:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    for service in ("", "inference.GRPCInferenceService"):
        answer = check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as raised:
        check(health_pb2.HealthCheckRequest(service="another"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_calls_are_counted(live: Live, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError):
        infer(channel, service_pb2.ModelInferRequest(model_name="nobody's"))
    infer(
        channel,
        service_pb2.ModelInferRequest(
            model_name="sides", inputs=[typed("vector", "FP32", [1, 2], fp32_contents=[5, -3])]
        ),
    )
    metrics = live.client.get("/metrics").text
    assert 'espalier_grpc_requests_total{code="OK",method="ModelInfer",model="sides"}' in metrics
    assert 'espalier_grpc_requests_total{code="NOT_FOUND",method="ModelInfer",model=""}' in metrics


def test_keys_are_asked_for(start: Start, tmp_path: Path) -> None:
    publish_vectors(tmp_path / "repository")
    keys = KeyStore(JobStore(Settings(home=tmp_path).database))
    may_infer, _ = keys.create("may infer", [Scope.INFER], Limits(requests_per_minute=3))
    may_train, _ = keys.create("may train", [Scope.TRAIN], Limits())
    live = start(grpc_port=0, auth="on")
    with tritonclient.grpc.InferenceServerClient(address(live)) as client:
        assert client.is_server_live()
        with pytest.raises(InferenceServerException) as raised:
            client.infer("points", [points()])
        assert raised.value.status() == "StatusCode.UNAUTHENTICATED"
        with pytest.raises(InferenceServerException) as raised:
            client.infer("points", [points()], headers={"authorization": f"Bearer {may_train}"})
        assert raised.value.status() == "StatusCode.PERMISSION_DENIED"
        headers = {"authorization": f"Bearer {may_infer}"}
        for _ in range(3):
            assert client.infer("points", [points()], headers=headers).as_numpy("logits").shape == (2, 2)
        with pytest.raises(InferenceServerException) as raised:
            client.infer("points", [points()], headers=headers)
        assert raised.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        refused: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: refused.put(error))
        client.async_stream_infer("points", [points()])
        assert refused.get(timeout=20).status() == "StatusCode.UNAUTHENTICATED"
        client.stop_stream()


def test_a_full_queue_says_when_to_come_back(start: Start, tmp_path: Path) -> None:
    publish_vectors(tmp_path / "repository")
    live = start(grpc_port=0, queue_limit=2)
    with grpc.insecure_channel(address(live)) as channel:
        request = service_pb2.ModelInferRequest(model_name="points")
        request.inputs.add(name="vector", datatype="FP32", shape=[2, 2])
        request.raw_input_contents.append(POINTS.tobytes())
        method = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )
        pending = [method.future(request) for _ in range(200)]
        refused = [call for call in pending if call.exception() is not None]
        for call in refused:
            assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(dict(call.trailing_metadata())["retry-after"]) >= 1
        assert len(refused) < len(pending)


def test_a_stop_answers_what_was_accepted_and_ends_idle_streams(start: Start, tmp_path: Path) -> None:
    publish_vectors(tmp_path / "repository")
    live = start(grpc_port=0)
    ended = threading.Event()
    with grpc.insecure_channel(address(live)) as channel:
        watched = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest())
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        stream = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

        def open_requests() -> Iterator[Any]:
            request = service_pb2.ModelInferRequest(model_name="points")
            request.inputs.add(name="vector", datatype="FP32", shape=[2, 2])
            request.raw_input_contents.append(POINTS.tobytes())
            yield request
            ended.wait(20)

        answers = stream(open_requests())
        assert not next(answers).error_message
        live.server.should_exit = True
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert list(answers) == []
        ended.set()


def test_the_server_starts_without_grpc_in_it(start: Start, tmp_path: Path) -> None:
    live = start()
    assert "grpc_port" not in live.server.application.state
