"""What the server counts and measures, in Prometheus's terms: espalier_<noun>_<unit>[_total], seconds and bytes.

Figures of the hot path are plain numbers that only the event loop touches, turned into metrics when they are asked
for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from server.generation_metrics import Generation
from server.histograms import Histograms
from server.job_metrics import JobGauges
from server.runtime.runs import Runs
from server.traces import Answered

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CACHE_EVENTS = {
    "hits": "requests answered from the cache, or with the run of an equal one",
    "misses": "requests that were run where there is a cache",
    "evictions": "answers that made room for others before their time was over",
}


class Metrics:
    """All metrics of one server, in a registry of its own. Attributes are the families."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        model, version = ["model", "version"], ["model", "version"]
        self.requests: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self.latency = Histograms(
            "espalier_request_seconds", "inference requests from first byte to answer", model, SECONDS
        )
        self.stages = Histograms(
            "espalier_stage_seconds", "time in decode, queue, inference and encode", [*version, "stage"], SECONDS
        )
        self.batches = Histograms("espalier_batch_rows", "rows that ran together", version, ROWS)
        self.failures = Histograms(
            "espalier_failed_request_seconds",
            "inference requests that ended in an error, until it was sent",
            model,
            SECONDS,
        )
        # What the statistics of the inference protocol ask for beside, by model and version.
        self.runs: defaultdict[tuple[str, str], Runs] = defaultdict(Runs)
        # By method, model and status code.
        self.grpc_requests: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self.generation = Generation()
        self.queue: dict[tuple[str, str], Callable[[], int]] = {}
        # Of the repository: footprints by model and version, loads by model and outcome, evictions, aliases.
        self.memory: dict[tuple[str, str], int] = {}
        self.loads: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.evictions: defaultdict[str, int] = defaultdict(int)
        self.aliases: dict[str, Mapping[str, int]] = {}
        # Requests that were also asked of a shadow, by model, its version and what came of it.
        self.shadows: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self.admitted: dict[tuple[str, str], Callable[[], float]] = {}
        self.rejected: defaultdict[tuple[str, str], int] = defaultdict(int)  # by model and reason
        self.cache: defaultdict[tuple[str, str], int] = defaultdict(int)  # by model and event
        self.cached_bytes: dict[tuple[str, str], Callable[[], int]] = {}
        self.model_info = Gauge(
            "espalier_model_info",
            "1 for every loaded model; its version, task and ONNX Runtime provider",
            ["model", "version", "task", "provider"],
            registry=self.registry,
        )
        self.load_seconds = Gauge(
            "espalier_model_load_seconds", "time to verify, load and warm up", version, registry=self.registry
        )
        self.refused = Counter(
            "espalier_bundles_refused_total",
            "versions that were damaged or did not load",
            model[:1],
            registry=self.registry,
        )
        self.jobs = JobGauges()
        # Adds what other processes of this server have counted, where there are any.
        self.gather: Callable[[], Awaitable[None]] | None = None
        for collector in (self.latency, self.failures, self.stages, self.batches, self.generation, self.jobs, self):
            self.registry.register(collector)

    async def gathered(self) -> None:
        """Wait until what other processes have counted until now is in here, too."""
        if self.gather is not None:
            await self.gather()

    def collect(self) -> Iterator[Metric]:
        """What is kept as plain numbers. They may change meanwhile: of each dict a list is taken first."""
        version, of_model = ["model", "version"], ["model"]
        outcomes = ["route", "model", "outcome"]
        yield counter("espalier_requests", "inference requests by outcome (HTTP status)", outcomes, self.requests)
        queued = {labels: waiting() for labels, waiting in list(self.queue.items())}
        yield gauge("espalier_queue_rows", "rows waiting for a run", version, queued)
        for event, words in CACHE_EVENTS.items():
            counts = {(name,): count for (name, which), count in list(self.cache.items()) if which == event}
            yield counter(f"espalier_cache_{event}", words, of_model, counts)
        kept: dict[tuple[str], int] = {}
        for (name, _), size in list(self.cached_bytes.items()):
            kept[name,] = kept.get((name,), 0) + size()
        yield gauge("espalier_cache_bytes", "of the answers that are kept", of_model, kept)
        limits = {labels: limit() for labels, limit in list(self.admitted.items())}
        yield gauge("espalier_admitted_limit", "rows that may wait, by the throughput of late", version, limits)
        reasons = ["model", "reason"]
        yield counter("espalier_rejected", "requests that were not run, by reason", reasons, self.rejected)
        codes = ["method", "model", "code"]
        yield counter("espalier_grpc_requests", "gRPC calls by status code", codes, self.grpc_requests)
        yield from self._repository()

    def _repository(self) -> Iterator[Metric]:
        version = ["model", "version"]
        words = "memory a loaded version takes, by its files"
        yield gauge("espalier_session_memory_bytes", words, version, self.memory)
        yield counter("espalier_model_loads", "versions loaded, or failed to", ["model", "outcome"], self.loads)
        evictions = {(name,): count for name, count in list(self.evictions.items())}
        yield counter("espalier_model_evictions", "lazy versions evicted to make room", ["model"], evictions)
        aliases = {
            (name, alias, str(meant)): 1
            for name, versions in list(self.aliases.items())
            for alias, meant in versions.items()
        }
        words = "1 for every alias; the version that it means"
        yield gauge("espalier_alias_info", words, ["model", "alias", "version"], aliases)
        words = "requests also asked of a shadow, by outcome"
        yield counter("espalier_shadow_requests", words, [*version, "outcome"], self.shadows)

    def point_at(self, answered: Answered, exemplar: Mapping[str, str]) -> None:
        """Have the histograms of what a traced request waited for point at it."""
        if answered.model is None:
            return
        labels = (answered.model, str(answered.version))
        for ran in answered.runs:
            self.stages.labels(*labels, "queue").point_at(ran.started - ran.queued, exemplar)
            if ran.finished:
                self.stages.labels(*labels, "inference").point_at(ran.inference, exemplar)
        for times in answered.sequences:
            generation = self.generation.of(*labels)
            generation.first_token.point_at(times.first - times.arrived, exemplar)
            generation.whole.point_at(times.last - times.arrived, exemplar)

    def render(self) -> bytes:
        """All of them in Prometheus's text format 0.0.4."""
        return generate_latest(self.registry)

    def render_open(self) -> bytes:
        """All of them in OpenMetrics 1.0.0, which has exemplars."""
        text: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
        return text


L = TypeVar("L", bound=tuple[str, ...])
F = TypeVar("F", CounterMetricFamily, GaugeMetricFamily)


def counter(name: str, words: str, labels: Sequence[str], counts: Mapping[L, float]) -> CounterMetricFamily:
    """counts: by the values of the labels. The exposition puts _total behind the name."""
    return filled(CounterMetricFamily(name, words, labels=labels), counts)


def gauge(name: str, words: str, labels: Sequence[str], values: Mapping[L, float]) -> GaugeMetricFamily:
    return filled(GaugeMetricFamily(name, words, labels=labels), values)


def filled(family: F, values: Mapping[L, float]) -> F:
    for labels, value in list(values.items()):
        family.add_metric(labels, value)
    return family
