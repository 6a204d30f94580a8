"""Traces through a server's socket: what was asked is found again as spans, in memory and at a collector."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from finetune.jobs.states import State
from finetune.jobs.store import JobError, Published
from server.cli import main
from server.settings import Settings
from server.traces import Traces
from tests.server.bundles import publish_vectors
from tests.server.chains import publish_letters, publish_translation
from tests.server.conftest import VECTORS, Live, Start, message_of, running, until

NOBODY = "http://127.0.0.1:9"  # discard
POINT = {"model": "points", "input": [0.5, 1.0]}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def parent(flags: str = "01", version: str = "00") -> dict[str, str]:
    return {"traceparent": f"{version}-{TRACE}-{PARENT}-{flags}"}


class Traced:
    """A server that traces everything into memory."""

    def __init__(self, live: Live) -> None:
        self.live, self.client = live, live.client
        self.memory = InMemorySpanExporter()
        self.traces: Traces = live.server.application.state.traces
        self.traces.sender.exporter = self.memory

    def of(self, request_id: str, names: int = 1, *, now: bool = True) -> list[ReadableSpan]:
        """The spans of the trace of a request, the first of which is its own, once there are so many. now: sent at
        once, not when the second is over."""
        found: list[ReadableSpan] = []
        assert self.traces.task is not None
        loop = self.traces.task.get_loop()

        def there() -> bool:
            if now:
                asyncio.run_coroutine_threadsafe(self.traces.send(settle=0.0), loop).result()
            spans = self.memory.get_finished_spans()
            root = [one for one in spans if one.attributes and one.attributes.get("espalier.request_id") == request_id]
            found[:] = root
            if root:
                assert len(root) == 1
                mine = root[0].context
                assert mine is not None
                found[1:] = [one for one in spans if one is not root[0] and one.context.trace_id == mine.trace_id]  # type: ignore[union-attr]
            return len(found) >= names

        until(there)
        return found


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    home = tmp_path_factory.mktemp("home")
    settings = Settings(home=home, port=0, worker=False, grpc_port=0, otlp_endpoint=NOBODY, trace_share=1.0)
    publish_vectors(settings.repository)
    publish_letters(settings.repository)
    publish_translation(settings.repository)
    with running(settings) as live:
        yield Traced(live)


def tree(spans: list[ReadableSpan]) -> dict[str, str | None]:
    """Names of spans, each with that of its parent."""
    names = {one.context.span_id: one.name for one in spans if one.context}
    return {one.name: None if one.parent is None else names.get(one.parent.span_id, "?") for one in spans}


def by_name(spans: list[ReadableSpan], name: str) -> ReadableSpan:
    [found] = [one for one in spans if one.name == name]
    return found


def test_a_request_is_told_from_its_first_byte_to_its_answer(traced: Traced) -> None:
    answer = traced.client.post("/v1/classify", json=POINT, headers={"x-request-id": "mine-1"})
    assert answer.status_code == 200
    spans = traced.of("mine-1", 6)
    whole = "POST /v1/classify"
    assert tree(spans) == {
        whole: None,
        "decode": whole,
        "queue": whole,
        "batch": whole,
        "session": "batch",
        "encode": whole,
    }
    root = spans[0]
    assert root.kind is SpanKind.SERVER
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/classify",
        "http.response.status_code": 200,
        "espalier.request_id": "mine-1",
        "espalier.model": "points",
        "espalier.version": 1,
    }
    batch, session = by_name(spans, "batch"), by_name(spans, "session")
    assert dict(batch.attributes or {}) == {"espalier.batch.rows": 1, "espalier.model": "points", "espalier.version": 1}
    assert (session.attributes or {})["espalier.provider"] == "CPUExecutionProvider"
    times = [(one.start_time, one.end_time) for one in spans]
    assert all(start and end and root.start_time and root.start_time <= start <= end for start, end in times)
    order = [by_name(spans, name) for name in ("decode", "queue", "batch", "encode")]
    for before, after in pairwise(order):
        assert before.end_time == after.start_time
    assert order[-1].end_time == root.end_time
    assert abs((root.start_time or 0) / 1e9 - time.time()) < 60


def test_a_trace_that_was_begun_elsewhere_goes_on(traced: Traced) -> None:
    traced.client.post("/v1/classify", json=POINT, headers={"x-request-id": "child", **parent()})
    root = traced.of("child")[0]
    assert root.context is not None
    assert f"{root.context.trace_id:032x}" == TRACE
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.parent.is_remote


def test_a_caller_who_does_not_trace_is_not_traced(traced: Traced) -> None:
    traced.client.post("/v1/classify", json=POINT, headers={"x-request-id": "unsampled", **parent("00")})
    traced.client.post("/v1/classify", json=POINT, headers={"x-request-id": "sampled"})
    traced.of("sampled")
    told = {(one.attributes or {}).get("espalier.request_id") for one in traced.memory.get_finished_spans()}
    assert "unsampled" not in told


@pytest.mark.parametrize("header", ["00-abc-def-01", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", ""])
def test_a_header_that_is_none_begins_a_trace(traced: Traced, header: str) -> None:
    request_id = f"broken-{len(header)}-{header[:4]}"
    traced.client.post("/v1/classify", json=POINT, headers={"x-request-id": request_id, "traceparent": header})
    root = traced.of(request_id)[0]
    assert root.parent is None
    assert root.context is not None
    assert f"{root.context.trace_id:032x}" != TRACE


def test_requests_of_one_batch_are_linked(traced: Traced) -> None:
    """Many at once: where some ran together, one of them names the others, and these it."""
    with ThreadPoolExecutor(16) as threads:
        for turn in range(20):
            names = [f"together-{turn}-{i}" for i in range(16)]

            def ask(name: str) -> None:
                traced.client.post("/v1/classify", json=POINT, headers={"x-request-id": name})

            list(threads.map(ask, names))
            found = [traced.of(name, 6, now=False) for name in names]
            shared = [(spans, by_name(spans, "batch")) for spans in found]
            shared = [(spans, batch) for spans, batch in shared if (batch.attributes or {})["espalier.batch.rows"] != 1]
            if shared:
                break
        else:
            pytest.fail("no two of 320 requests ran together")
    roots = {spans[0].context.span_id: batch for spans, batch in shared if spans[0].context}
    together: dict[int | None, list[tuple[int, set[int], int]]] = {}
    for spans, batch in shared:
        rows = (batch.attributes or {})["espalier.batch.rows"]
        linked = {link.context.span_id for link in batch.links}
        assert all(roots[other].start_time == batch.start_time for other in linked)
        together.setdefault(batch.start_time, []).append((spans[0].context.span_id, linked, rows))  # type: ignore[union-attr, arg-type]
    for batches in together.values():
        members = {mine for mine, _, _ in batches}
        assert {rows for _, _, rows in batches} == {len(members)}
        [first] = [
            mine for mine, linked, _ in batches if linked == members - {mine} and len(linked) == len(members) - 1
        ][:1]
        assert all(linked == {first} for mine, linked, _ in batches if mine != first)


def test_a_language_model_tells_of_its_sequences(traced: Traced) -> None:
    asked: dict[str, object] = {"model": "letters", "prompt": "ab", "max_tokens": 3, "n": 8, "temperature": 1.0}
    asked |= {"seed": 1, "logit_bias": {"256": 4.5}}  # the end is as likely as a third of the letters
    answer = traced.client.post("/v1/completions", json=asked, headers={"x-request-id": "written"}).json()
    assert {one["finish_reason"] for one in answer["choices"]} == {"stop", "length"}, "the end of some is no token told"
    spans = traced.of("written", 1 + 3 * 8)
    whole = "POST /v1/completions"
    assert tree(spans) == {whole: None, "queue": whole, "prefill": whole, "decode": whole}
    told = [dict(one.attributes or {}) for one in spans if one.name == "decode"]
    assert [one["espalier.sequence"] for one in told] == list(range(8))
    assert sum(one["gen_ai.usage.output_tokens"] for one in told) == answer["usage"]["completion_tokens"]  # type: ignore[misc]
    assert {(one.attributes or {})["gen_ai.usage.input_tokens"] for one in spans if one.name == "prefill"} == {2}


def test_a_stream_is_told_to_its_end(traced: Traced) -> None:
    asked = {"model": "letters", "prompt": "ab", "max_tokens": 3, "stream": True}
    traced.client.post("/v1/completions", json=asked, headers={"x-request-id": "streamed"})
    spans = traced.of("streamed", 4)
    assert by_name(spans, "decode").end_time <= spans[0].end_time  # type: ignore[operator]


def test_a_translation_ran_in_a_batch(traced: Traced) -> None:
    model = next(name for name, one in traced.live.repository.models.items() if one.writer is not None)
    answer = traced.client.post("/v1/completions", json={"model": model, "prompt": "a"}, headers={"x-request-id": "tr"})
    assert answer.status_code == 200, answer.text
    assert tree(traced.of("tr", 6))["session"] == "batch"


def grpc_client(traced: Traced) -> tritonclient.grpc.InferenceServerClient:
    port = traced.live.server.application.state.grpc_port
    return tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port}")


def tensor(rows: np.ndarray) -> tritonclient.grpc.InferInput:
    found = tritonclient.grpc.InferInput("vector", list(rows.shape), "FP32")
    found.set_data_from_numpy(rows)
    return found


def test_grpc_is_traced_as_well(traced: Traced) -> None:
    with grpc_client(traced) as client:
        client.infer("points", [tensor(np.float32([[1, 2]]))], request_id="rpc-1", headers=parent())
        with pytest.raises(InferenceServerException):
            client.infer("nobody", [tensor(np.float32([[1, 2]]))], request_id="rpc-2")
    whole = "inference.GRPCInferenceService/ModelInfer"
    spans = [one for one in traced.of("rpc-1", 6) if (one.attributes or {}).get("espalier.request_id") != "child"]
    [root] = [one for one in spans if one.name == whole]
    mine = [root, *(one for one in spans if one.parent and one.parent.span_id == root.context.span_id)]  # type: ignore[union-attr]
    assert {one.name for one in mine} == {whole, "decode", "queue", "batch", "encode"}
    about = dict(root.attributes or {})
    assert (about["rpc.system"], about["rpc.method"], about["rpc.grpc.status_code"]) == ("grpc", "ModelInfer", 0)
    assert about["espalier.model"] == "points"
    assert f"{root.parent.span_id:016x}" == PARENT  # type: ignore[union-attr]
    refused = traced.of("rpc-2")[0]
    assert (refused.attributes or {})["rpc.grpc.status_code"] == 5
    assert refused.status.status_code is StatusCode.UNSET


def test_tensors_over_rest_are_traced_as_well(traced: Traced) -> None:
    sent = {"inputs": [{"name": "vector", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}]}
    answer = traced.client.post("/v2/models/points/infer", json=sent, headers={"x-request-id": "v2-1"})
    assert answer.status_code == 200, answer.text
    assert tree(traced.of("v2-1", 6))["session"] == "batch"


def test_what_went_wrong_is_told_as_well(traced: Traced) -> None:
    wrong = {"model": "points", "input": [1.0]}
    message_of(traced.client.post("/v1/classify", json=wrong, headers={"x-request-id": "wrong"}), 400)
    root = traced.of("wrong")[0]
    assert (root.attributes or {})["http.response.status_code"] == 400
    assert root.status.status_code is StatusCode.UNSET  # the client's own fault


def test_other_routes_are_traced_by_their_pattern_and_probes_are_not(traced: Traced) -> None:
    for path, name in (("/v1/files/file-none", "files"), ("/v1/models", "models"), ("/nowhere", "nowhere")):
        traced.client.get(path, headers={"x-request-id": f"other-{name}"})
    for path in ("/health/live", "/metrics"):
        traced.client.get(path, headers={"x-request-id": "probe"})
    assert re.fullmatch(r"GET /v1/files/\{file_id.*\}", traced.of("other-files")[0].name)
    assert traced.of("other-models")[0].name == "GET /v1/models"
    assert (traced.of("other-nowhere")[0].attributes or {})["http.response.status_code"] == 404
    told = {(one.attributes or {}).get("espalier.request_id") for one in traced.memory.get_finished_spans()}
    assert "probe" not in told


def test_histograms_point_at_traces(traced: Traced) -> None:
    traced.client.post("/v1/classify", json=POINT, headers={"x-request-id": "pointed-at"})
    traced.client.post("/v1/completions", json={"model": "letters", "prompt": "ab", "max_tokens": 2})
    asked = "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5"
    answer = traced.client.get("/metrics", headers={"accept": asked})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.text.endswith("# EOF\n")
    pointed: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(answer.text):
        pointed[family.name] = [sample.exemplar for sample in family.samples if sample.exemplar]
    for name in ("request_seconds", "stage_seconds", "time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert pointed[f"espalier_{name}"], name
    [found] = [one for one in pointed["espalier_request_seconds"] if one.labels["request_id"] == "pointed-at"]
    root = traced.of("pointed-at")[0]
    assert root.context is not None
    assert found.labels["trace_id"] == f"{root.context.trace_id:032x}"
    plain = traced.client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "trace_id" not in plain.text


# At a collector


class Collector:
    """Takes OTLP over HTTP, on a socket of its own."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                for of_resource in sent.resource_spans:
                    names = {one.key: one.value.string_value for one in of_resource.resource.attributes}
                    collector.services.add(names["service.name"])
                    for scope in of_resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_a_collector_gets_what_was_asked(tmp_path: Path, collector: Collector) -> None:
    settings = Settings(home=tmp_path, port=0, worker=False, otlp_endpoint=collector.address, trace_share=0.0)
    publish_vectors(settings.repository)
    with running(settings) as live:
        live.client.post("/v1/classify", json=POINT)  # of share 0
        live.client.post("/v1/classify", json=POINT, headers=parent())
        until(lambda: len(collector.spans) >= 6)
        live.client.post("/v1/classify", json=POINT, headers=parent())
    assert len(collector.spans) == 12  # the last were sent when it stopped
    assert collector.services == {"espalier"}
    assert {one.trace_id.hex() for one in collector.spans} == {TRACE}
    [first, second] = [one for one in collector.spans if one.name == "POST /v1/classify"]
    assert first.parent_span_id.hex() == second.parent_span_id.hex() == PARENT
    batches = [one for one in collector.spans if one.name == "batch"]
    assert {one.parent_span_id for one in batches} == {first.span_id, second.span_id}


def test_a_job_is_told_when_it_has_ended(tmp_path: Path, collector: Collector) -> None:
    """Its worker is the test, which knows when the job came into which state."""
    settings = Settings(home=tmp_path, port=0, worker=False, otlp_endpoint=collector.address, trace_share=0.0)
    with running(settings) as live:
        file_id = live.file_id("points.csv", VECTORS)
        recipe = {"model": {"architecture": "mlp", "hyperparameters": {"hidden": [4]}}, "training_file": file_id}
        jobs = [live.client.post("/v1/fine_tuning/jobs", json=recipe).json()["id"] for _ in range(3)]
        for job, end in zip(jobs, (State.SUCCEEDED, State.FAILED), strict=False):
            assert live.store.claim("w") is not None
            live.store.transition("w", job, State.RUNNING)
            if end is State.SUCCEEDED:
                live.store.transition("w", job, State.EXPORTING)
                live.store.transition("w", job, end, result=Published("points", 3))
            else:
                live.store.transition("w", job, end, error=JobError("invalid_file", "no such column"))
    told = [one for one in collector.spans if one.name == "fine_tuning.job"]
    about = [{one.key: one.value for one in span.attributes} for span in told]
    assert [one["espalier.job"].string_value for one in about] == jobs[:2]  # the third still waits
    assert [one["espalier.base_model"].string_value for one in about] == ["mlp", "mlp"]
    assert about[0]["espalier.version"].int_value == 3
    assert [(one.status.code, one.status.message) for one in told] == [(0, ""), (2, "no such column")]
    for span, states in zip(
        told, (["queued", "validating", "running", "exporting"], ["queued", "validating", "running"]), strict=True
    ):
        parts = [one for one in collector.spans if one.parent_span_id == span.span_id]
        assert [one.name for one in parts] == states
        assert parts[0].start_time_unix_nano == span.start_time_unix_nano
        assert parts[-1].end_time_unix_nano == span.end_time_unix_nano
        for before, after in pairwise(parts):
            assert before.end_time_unix_nano == after.start_time_unix_nano


def test_a_collector_that_is_not_there_stops_nothing(start: Start, tmp_path: Path) -> None:
    publish_vectors(tmp_path / "repository")
    live = start(otlp_endpoint=NOBODY, trace_share=1.0)
    for _ in range(3):
        assert live.client.post("/v1/classify", json=POINT).status_code == 200


def test_without_a_collector_there_are_no_exemplars(start: Start, tmp_path: Path) -> None:
    publish_vectors(tmp_path / "repository")
    live = start()
    assert live.client.post("/v1/classify", json=POINT, headers=parent()).status_code == 200
    assert "trace_id" not in live.client.get("/metrics", headers={"accept": "application/openmetrics-text"}).text


def test_a_start_without_the_packages_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "server.spans", raising=False)
    assert main(["serve", "--home", str(tmp_path), "--port", "0", "--otlp-endpoint", NOBODY]) == 2
    assert "pip install 'espalier[traces]'" in capsys.readouterr().err
