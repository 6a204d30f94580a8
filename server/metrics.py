"""What the server counts and measures, in Prometheus's terms: espalier_<noun>_<unit>[_total], seconds and bytes.

Figures of the hot path are plain numbers that only the event loop touches, turned into metrics when they are asked
for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import Metric
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
        """The counters of requests, and the depth of every queue."""
        requests = Metric("espalier_requests", "inference requests by outcome (HTTP status)", "counter")
        for (route, name, status), count in list(self.requests.items()):
            labels = {"route": route, "model": name, "outcome": status}
            requests.add_sample("espalier_requests_total", labels, count)
        depth = Metric("espalier_queue_rows", "rows waiting for a run", "gauge")
        for (name, number), waiting in list(self.queue.items()):
            depth.add_sample("espalier_queue_rows", {"model": name, "version": number}, waiting())
        calls = Metric("espalier_grpc_requests", "gRPC calls by status code", "counter")
        for (method, name, code), count in list(self.grpc_requests.items()):
            calls.add_sample("espalier_grpc_requests_total", {"method": method, "model": name, "code": code}, count)
        admitted = Metric("espalier_admitted_limit", "rows that may wait, by the throughput of late", "gauge")
        for (name, number), limit in list(self.admitted.items()):
            admitted.add_sample("espalier_admitted_limit", {"model": name, "version": number}, limit())
        rejected = Metric("espalier_rejected", "requests that were not run, by reason", "counter")
        for (name, reason), count in list(self.rejected.items()):
            rejected.add_sample("espalier_rejected_total", {"model": name, "reason": reason}, count)
        yield requests
        yield depth
        for event, words in CACHE_EVENTS.items():
            family = Metric(f"espalier_cache_{event}", words, "counter")
            for (name, which), count in list(self.cache.items()):
                if which == event:
                    family.add_sample(f"espalier_cache_{event}_total", {"model": name}, count)
            yield family
        held = Metric("espalier_cache_bytes", "of the answers that are kept", "gauge")
        for name in {name for name, _ in self.cached_bytes}:
            sizes = [size() for (of, _), size in list(self.cached_bytes.items()) if of == name]
            held.add_sample("espalier_cache_bytes", {"model": name}, sum(sizes))
        yield held
        yield admitted
        yield rejected
        yield calls
        yield from self._repository()

    def _repository(self) -> Iterator[Metric]:
        memory = Metric("espalier_session_memory_bytes", "memory a loaded version takes, by its files", "gauge")
        for (name, number), size in list(self.memory.items()):
            memory.add_sample("espalier_session_memory_bytes", {"model": name, "version": number}, size)
        yield memory
        loads = Metric("espalier_model_loads", "versions loaded, or failed to", "counter")
        for (name, outcome), count in list(self.loads.items()):
            loads.add_sample("espalier_model_loads_total", {"model": name, "outcome": outcome}, count)
        yield loads
        evictions = Metric("espalier_model_evictions", "lazy versions evicted to make room", "counter")
        for name, count in list(self.evictions.items()):
            evictions.add_sample("espalier_model_evictions_total", {"model": name}, count)
        yield evictions
        aliases = Metric("espalier_alias_info", "1 for every alias; the version that it means", "gauge")
        for name, versions in list(self.aliases.items()):
            for alias, version in versions.items():
                labels = {"model": name, "alias": alias, "version": str(version)}
                aliases.add_sample("espalier_alias_info", labels, 1)
        yield aliases
        shadows = Metric("espalier_shadow_requests", "requests also asked of a shadow, by outcome", "counter")
        for (name, number, outcome), count in list(self.shadows.items()):
            labels = {"model": name, "version": number, "outcome": outcome}
            shadows.add_sample("espalier_shadow_requests_total", labels, count)
        yield shadows

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
