"""What generation counts and measures: vLLM's metrics with its meanings, as docs/metrics.md defines them.

The engine tells what happens to its sequences, and when; only its thread does, with plain numbers, so that a token
costs about a microsecond. A sequence is what vLLM calls a request: one of the n of an order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from prometheus_client.core import Metric

from server.histograms import Distribution, Histograms

LABELS = ("model", "version")
# From a token of a small network to an answer of thousands: half a decade has about five.
SECONDS = tuple(float(f"{digit}e{power}") for power in range(-3, 3) for digit in (1, 1.5, 2, 3, 5, 7.5))
TOKENS = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))

FinishReason = Literal["stop", "length", "abort", "error"]


class Occupancy(NamedTuple):
    """What an engine holds at this moment. running: sequences that have a slot, one each. waiting: those that have none
    yet. slots: in all. tokens: of the running ones, whose keys and values are there. places: for tokens of sequences
    that run, in all."""

    running: int
    waiting: int
    slots: int
    tokens: int
    places: int


@dataclass(slots=True)
class Times:
    """Of one sequence, seconds of time.perf_counter. arrived: when its request came, before it was tokenized.
    scheduled: when its prompt began to be read. first, last: its first and its newest token. end: 1 where the newest is
    that of the end, which no answer tells."""

    arrived: float
    prompt_tokens: int
    scheduled: float = 0.0
    first: float = 0.0
    last: float = 0.0
    generated_tokens: int = 0
    end: int = 0


class GenerationMetrics:
    """Of one version of one model. The engine sets `occupancy`; the repository takes it away with the model."""

    def __init__(self, family: Callable[[str], Distribution]) -> None:
        """family: the distribution of this model in the family of that name."""
        self.occupancy: Callable[[], Occupancy] | None = None
        self.prompt_tokens = self.generation_tokens = 0
        self.prefix_queries = self.prefix_hits = 0
        self.finished_sequences: dict[str, int] = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.first_token = family("time_to_first_token_seconds")
        self.inter_token = family("inter_token_latency_seconds")
        self.per_token = family("request_time_per_output_token_seconds")
        self.whole = family("e2e_request_latency_seconds")
        self.queue = family("request_queue_time_seconds")
        self.prefill = family("request_prefill_time_seconds")
        self.decode = family("request_decode_time_seconds")
        self.inference = family("request_inference_time_seconds")
        self.read = family("request_prompt_tokens")
        self.written = family("request_generation_tokens")
        self.iteration = family("iteration_tokens")

    def begins(self, times: Times, now: float, *, reused: int = 0) -> None:
        """The first run for a sequence is about to begin. reused: tokens at the front of its prompt whose keys and
        values were there."""
        times.scheduled = now
        self.prefix_queries += times.prompt_tokens
        self.prefix_hits += reused

    def step(self, grown: Iterable[Times], tokens: int, now: float) -> None:
        """A run of the network. grown: sequences that got a token each, be it that of the end. tokens: all that it
        computed, those of prompts too; 0: one more token by the same run."""
        if tokens:
            self.iteration.observe(tokens)
        for times in grown:
            if times.generated_tokens:
                self.inter_token.observe(now - times.last)
            else:
                times.first = now
                self.prompt_tokens += times.prompt_tokens
                self.first_token.observe(now - times.arrived)
            times.last = now
            times.generated_tokens += 1
            self.generation_tokens += 1

    def finished(self, times: Times, reason: FinishReason, now: float) -> None:
        """A sequence has ended, or was given up (abort: nobody waits for it or its time is over; error: the network
        failed), perhaps before it had a slot or a token. Only what ended by itself is in the histograms."""
        self.finished_sequences[reason] += 1
        if reason in ("abort", "error") or not times.generated_tokens:
            return
        self.whole.observe(now - times.arrived)
        self.queue.observe(times.scheduled - times.arrived)
        self.prefill.observe(times.first - times.scheduled)
        self.decode.observe(times.last - times.first)
        self.inference.observe(times.last - times.scheduled)
        if times.generated_tokens > 1:
            self.per_token.observe((times.last - times.first) / (times.generated_tokens - 1))
        self.read.observe(times.prompt_tokens)
        self.written.observe(times.generated_tokens)


class Generation:
    """The metrics of all models that generate; a collector of prometheus-client."""

    def __init__(self) -> None:
        families = {
            "time_to_first_token_seconds": ("from the request's arrival to its first token", SECONDS),
            "inter_token_latency_seconds": ("between two tokens of a sequence", SECONDS),
            "request_time_per_output_token_seconds": ("mean time between a sequence's tokens", SECONDS),
            "e2e_request_latency_seconds": ("from the request's arrival to a sequence's end", SECONDS),
            "request_queue_time_seconds": ("from arrival to the first run for the sequence", SECONDS),
            "request_prefill_time_seconds": ("from its first run to its first token", SECONDS),
            "request_decode_time_seconds": ("from the first token to the last", SECONDS),
            "request_inference_time_seconds": ("from its first run to its last token", SECONDS),
            "request_prompt_tokens": ("tokens of a sequence's prompt", TOKENS),
            "request_generation_tokens": ("tokens of a sequence's answer", TOKENS),
            "iteration_tokens": ("tokens that one run of the network computed", TOKENS),
        }
        self.families = {
            name: Histograms(f"espalier_{name}", words, LABELS, bounds) for name, (words, bounds) in families.items()
        }
        self.models: dict[tuple[str, str], GenerationMetrics] = {}

    def of(self, model: str, version: str) -> GenerationMetrics:
        """Those of one version of one model."""
        if (model, version) not in self.models:
            self.models[model, version] = GenerationMetrics(lambda name: self.families[name].labels(model, version))
        return self.models[model, version]

    def retire(self, model: str, version: str) -> None:
        """It is no longer served: what it holds is no longer asked for, and its memory may be freed."""
        if found := self.models.get((model, version)):
            found.occupancy = None

    def collect(self) -> Iterator[Metric]:
        for family in self.families.values():
            yield from family.collect()
        models = list(self.models.items())
        counters: dict[str, tuple[str, Callable[[GenerationMetrics], int]]] = {
            "prompt_tokens": ("tokens of prompts that were read to their end", lambda of: of.prompt_tokens),
            "generation_tokens": ("tokens generated", lambda of: of.generation_tokens),
            "prefix_cache_queries": (
                "tokens of prompts looked for among those read before",
                lambda of: of.prefix_queries,
            ),
            "prefix_cache_hits": ("tokens of prompts found there, and not computed again", lambda of: of.prefix_hits),
        }
        for name, (words, count) in counters.items():
            metric = Metric(f"espalier_{name}", words, "counter")
            for labels, found in models:
                metric.add_sample(f"espalier_{name}_total", dict(zip(LABELS, labels, strict=True)), count(found))
            yield metric
        ended = Metric("espalier_finished_sequences", "sequences by how they ended", "counter")
        for labels, found in models:
            for reason, number in found.finished_sequences.items():
                by = {**dict(zip(LABELS, labels, strict=True)), "finished_reason": reason}
                ended.add_sample("espalier_finished_sequences_total", by, number)
        yield ended
        held = [(labels, found.occupancy()) for labels, found in models if found.occupancy is not None]
        gauges: dict[str, tuple[str, Callable[[Occupancy], float]]] = {
            "sequences_running": ("sequences in a slot", lambda now: now.running),
            "sequences_waiting": ("sequences that wait for a slot", lambda now: now.waiting),
            "slot_usage_ratio": ("slots in use; 1: all", lambda now: now.running / now.slots),
            "kv_cache_usage_ratio": (
                "places for keys and values in use; 1: all",
                lambda now: now.tokens / now.places,
            ),
        }
        for name, (words, value) in gauges.items():
            metric = Metric(f"espalier_{name}", words, "gauge")
            for labels, now in held:
                metric.add_sample(f"espalier_{name}", dict(zip(LABELS, labels, strict=True)), value(now))
            yield metric
