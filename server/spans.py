"""OpenTelemetry's spans of requests that were answered, and of jobs that have ended.

The server imports this where traces are wanted, and only then. Names of attributes are OpenTelemetry's where it has
them (http.*, rpc.*, gen_ai.*), else espalier.*.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from finetune.jobs.states import State
from finetune.jobs.store import Job
from server.generation_metrics import Times
from server.traces import Answered, Origin, Ran

# A batch names no more of the other requests that ran in it; what OpenTelemetry lets a span have by default.
MOST_LINKS = 128
SPANS_A_SEND = 512
SEND_TIMEOUT_SECONDS = 5.0

# gRPC's statuses that are the server's fault: unknown, deadline exceeded, unimplemented, internal, unavailable, data
# loss.
FAULTS = (2, 4, 12, 13, 14, 15)

Attributes = dict[str, str | int | float]
Batch = tuple[str | None, int | None, float]  # model, version, when it began


class Sender:
    """Makes spans and sends them; blocks meanwhile."""

    def __init__(self, endpoint: str) -> None:
        """endpoint: of a collector that speaks OTLP over HTTP, without or with /v1/traces at its end."""
        endpoint = endpoint.rstrip("/")
        path = "" if endpoint.endswith("/v1/traces") else "/v1/traces"
        self.exporter: SpanExporter = OTLPSpanExporter(endpoint=endpoint + path, timeout=SEND_TIMEOUT_SECONDS)
        self.resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "espalier")})

    def send(self, answered: Sequence[Answered]) -> None:
        """Those that ran in one batch have to come together. What goes wrong is logged by the exporter."""
        found = spans(answered, self.resource)
        for first in range(0, len(found), SPANS_A_SEND):
            self.exporter.export(found[first : first + SPANS_A_SEND])

    def send_job(self, job: Job, stages: Sequence[tuple[State, float]]) -> None:
        self.exporter.export(job_spans(job, stages, self.resource))

    def close(self) -> None:
        self.exporter.shutdown()


def spans(answered: Sequence[Answered], resource: Resource) -> list[ReadableSpan]:
    """All spans of these requests."""
    together: defaultdict[Batch, list[Origin]] = defaultdict(list)
    for one in answered:
        for ran in one.runs:
            together[one.model, one.version, ran.started].append(one.origin)
    made: list[ReadableSpan] = []
    since = time.time_ns() - time.perf_counter_ns()
    for one in answered:
        trace = Trace(one, resource, made, since)
        for ran in one.runs:
            trace.run(ran, together[one.model, one.version, ran.started])
        for number, times in enumerate(one.sequences):
            trace.sequence(number, times)
    return made


class Trace:
    """The spans of one request, put into `made`, itself first."""

    def __init__(self, one: Answered, resource: Resource, made: list[ReadableSpan], since: int) -> None:
        """since: from the epoch to the zero of time.perf_counter's clock, in nanoseconds."""
        self.one, self.resource, self.made, self.since = one, resource, made, since
        self.scope = InstrumentationScope("espalier")
        self.root = context(one.origin.trace, one.origin.span)
        name, about = self.root_of_rpc() if one.rpc else self.root_of_http()
        if one.request_id:
            about["espalier.request_id"] = one.request_id
        if one.key is not None:
            about["espalier.key"] = one.key
        parent = context(one.origin.trace, one.origin.parent, remote=True) if one.origin.parent else None
        failed = one.status in FAULTS if one.rpc else one.status >= 500
        status = Status(StatusCode.ERROR) if failed else Status()
        self.span(name, one.start, one.end, about | self.model(), self.root, parent, SpanKind.SERVER, status)

    def root_of_http(self) -> tuple[str, Attributes]:
        method, route = self.one.method, self.one.route
        about: Attributes = {"http.request.method": method, "http.route": route}
        return f"{method} {route}", about | {"http.response.status_code": self.one.status}

    def root_of_rpc(self) -> tuple[str, Attributes]:
        service, _, method = self.one.route.partition("/")
        about: Attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        return self.one.route, about | {"rpc.grpc.status_code": self.one.status}

    def model(self) -> Attributes:
        if self.one.model is None or self.one.version is None:
            return {}
        return {"espalier.model": self.one.model, "espalier.version": self.one.version}

    def run(self, ran: Ran, batch: Sequence[Origin]) -> None:
        """Of a request that went through a batcher. batch: whose spans ran with it, its own as well."""
        self.part("decode", self.one.start, ran.queued)
        self.part("queue", ran.queued, ran.started or self.one.end, {"espalier.rows": ran.rows})
        if not ran.started:
            return  # dropped before its turn
        # A translation is told as it is written, and its request may be over before the run is.
        finished, inference = ran.finished or self.one.end, ran.inference or self.one.end - ran.started
        # One of them links to all others, and these to it: links that were all with all would be most of a trace.
        first = batch[0]
        others = batch[1 : 1 + MOST_LINKS] if first is self.one.origin else [first]
        links = [Link(context(one.trace, one.span)) for one in others]
        rows: Attributes = {"espalier.batch.rows": ran.batch_rows}
        together = self.part("batch", ran.started, finished, rows | self.model(), links=links)
        about = rows | ({} if self.one.provider is None else {"espalier.provider": self.one.provider})
        begun = max(ran.started, finished - inference)
        self.part("session", begun, finished, about | self.model(), parent=together)
        self.part("encode", finished, self.one.end)

    def sequence(self, number: int, times: Times) -> None:
        """Of one that a language model wrote, or began."""
        about: Attributes = {"espalier.sequence": number, **self.model()}
        if self.one.model is not None:
            about["gen_ai.request.model"] = self.one.model
        self.part("queue", times.arrived, times.scheduled or self.one.end, about)
        if times.scheduled:
            read = about | {"gen_ai.usage.input_tokens": times.prompt_tokens}
            self.part("prefill", times.scheduled, times.first or self.one.end, read)
        if times.first:
            written = about | {"gen_ai.usage.output_tokens": times.generated_tokens - times.end}
            self.part("decode", times.first, times.last, written)

    def part(
        self,
        name: str,
        start: float,
        end: float,
        attributes: Attributes | None = None,
        *,
        parent: SpanContext | None = None,
        links: Sequence[Link] = (),
    ) -> SpanContext:
        made = context(self.one.origin.trace, random.getrandbits(64) or 1)
        self.span(name, start, end, attributes or {}, made, parent or self.root, links=links)
        return made

    def span(
        self,
        name: str,
        start: float,
        end: float,
        attributes: Attributes,
        its: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status | None = None,
        links: Sequence[Link] = (),
    ) -> None:
        self.made.append(
            ReadableSpan(
                name,
                its,
                parent,
                self.resource,
                attributes,
                links=links,
                kind=kind,
                status=status or Status(),
                start_time=self.since + round(start * 1e9),
                end_time=self.since + round(max(start, end) * 1e9),
                instrumentation_scope=self.scope,
            )
        )


def job_spans(job: Job, stages: Sequence[tuple[State, float]], resource: Resource) -> list[ReadableSpan]:
    """Of a job that has ended, and of each state that it was in before. stages: with the moment that each began, the
    first and the last at least. Their ids follow from the job's: where servers share a job store, all tell the same."""
    trace = int(hashlib.sha256(job.id.encode()).hexdigest()[:32], 16)

    def span(number: int, name: str, start: float, end: float, about: Attributes, status: Status) -> ReadableSpan:
        return ReadableSpan(
            name,
            context(trace, (trace + number) % 2**64 or 1),
            None if number == 0 else made[0].context,
            resource,
            about,
            status=status,
            start_time=round(start * 1e9),
            end_time=round(max(start, end) * 1e9),
            instrumentation_scope=InstrumentationScope("espalier"),
        )

    about: Attributes = {
        "espalier.job": job.id,
        "espalier.model": job.name,
        "espalier.base_model": job.recipe.model if isinstance(job.recipe.model, str) else job.recipe.model.architecture,
        "espalier.trained_samples": job.trained_samples,
        "espalier.state": job.state.value,
    }
    if job.result is not None:
        about["espalier.version"] = job.result.version
    status = Status() if job.error is None else Status(StatusCode.ERROR, job.error.message)
    made: list[ReadableSpan] = []
    made.append(span(0, "fine_tuning.job", stages[0][1], stages[-1][1], about, status))
    for number, ((state, start), (_, end)) in enumerate(pairwise(stages), 1):
        made.append(span(number, state.value, start, end, {"espalier.job": job.id}, Status()))
    return made


def context(trace: int, span: int, *, remote: bool = False) -> SpanContext:
    return SpanContext(trace, span, remote, TraceFlags(TraceFlags.SAMPLED))
