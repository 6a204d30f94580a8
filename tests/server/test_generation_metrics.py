"""What the metrics of generation mean, read off the exposition that Prometheus scrapes. The clock is scripted."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.generation_metrics import Occupancy, Times
from server.metrics import Metrics


def scrape(metrics: Metrics, **labels: str) -> dict[str, float]:
    """Samples of the model's labels by name, buckets left out; further labels narrow it."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            of = {"model": "tales", "version": "3", **labels}
            if sample.labels == of:
                found[sample.name.removeprefix("espalier_")] = sample.value
    return found


def test_intervals_of_a_sequence_have_vllms_meanings() -> None:
    metrics = Metrics()
    counted = metrics.generation.of("tales", "3")
    times = Times(arrived=100.0, prompt_tokens=50)
    counted.begins(times, 100.5, reused=32)
    counted.step([], 10, 100.7)  # a part of the prompt: no token yet
    counted.step([times], 8, 101.0)
    counted.step([times], 1, 101.25)
    counted.step([times], 1, 102.0)
    counted.finished(times, "stop", 102.5)
    found = scrape(metrics)
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(1.0)  # arrival → first token
    assert found["inter_token_latency_seconds_sum"] == pytest.approx(0.25 + 0.75)  # every gap
    assert found["inter_token_latency_seconds_count"] == 2
    assert found["request_time_per_output_token_seconds_sum"] == pytest.approx(0.5)  # decode / (tokens - 1)
    assert found["request_time_per_output_token_seconds_count"] == 1
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(2.5)  # arrival → end
    assert found["request_queue_time_seconds_sum"] == pytest.approx(0.5)  # arrival → slot
    assert found["request_prefill_time_seconds_sum"] == pytest.approx(0.5)  # slot → first token
    assert found["request_decode_time_seconds_sum"] == pytest.approx(1.0)  # first → last token
    assert found["request_inference_time_seconds_sum"] == pytest.approx(1.5)  # slot → last token
    assert found["prompt_tokens_total"] == found["request_prompt_tokens_sum"] == 50
    assert found["generation_tokens_total"] == found["request_generation_tokens_sum"] == 3
    assert found["prefix_cache_queries_total"] == 50
    assert found["prefix_cache_hits_total"] == 32
    assert (found["iteration_tokens_sum"], found["iteration_tokens_count"]) == (20, 4)
    assert scrape(metrics, finished_reason="stop")["finished_sequences_total"] == 1


def test_a_sequence_is_in_the_bucket_of_its_time() -> None:
    metrics = Metrics()
    counted = metrics.generation.of("tales", "3")
    times = Times(arrived=0.0, prompt_tokens=1)
    counted.begins(times, 0.0)
    counted.step([times], 1, 0.2)
    buckets = {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == "espalier_time_to_first_token_seconds_bucket"
    }
    assert buckets[0.15] == 0
    assert buckets[0.2] == buckets[float("inf")] == 1


def test_what_was_given_up_is_counted_but_not_timed() -> None:
    metrics = Metrics()
    counted = metrics.generation.of("tales", "3")
    waiting, reading, writing = (Times(arrived=0.0, prompt_tokens=7) for _ in range(3))
    counted.finished(waiting, "abort", 1.0)  # never had a slot
    counted.begins(reading, 1.0)
    counted.finished(reading, "abort", 2.0)  # never had a token
    counted.begins(writing, 1.0)
    counted.step([writing], 7, 2.0)
    counted.finished(writing, "error", 3.0)
    found = scrape(metrics)
    assert scrape(metrics, finished_reason="abort")["finished_sequences_total"] == 2
    assert scrape(metrics, finished_reason="error")["finished_sequences_total"] == 1
    assert scrape(metrics, finished_reason="length")["finished_sequences_total"] == 0
    assert found["prompt_tokens_total"] == 7  # of the one prompt that was read to its end
    assert found["time_to_first_token_seconds_count"] == 1
    assert found["e2e_request_latency_seconds_count"] == found["request_queue_time_seconds_count"] == 0


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    metrics = Metrics()
    counted = metrics.generation.of("tales", "3")
    times = Times(arrived=0.0, prompt_tokens=7)
    counted.begins(times, 1.0)
    counted.step([times], 7, 2.0)
    counted.finished(times, "length", 2.0)
    found = scrape(metrics)
    assert found["request_time_per_output_token_seconds_count"] == found["inter_token_latency_seconds_count"] == 0
    assert found["e2e_request_latency_seconds_count"] == 1


def test_gauges_are_asked_at_every_scrape_until_the_model_is_retired() -> None:
    metrics = Metrics()
    now = [Occupancy(running=3, waiting=2, slots=4, tokens=100, places=200)]
    metrics.generation.of("tales", "3").occupancy = lambda: now[0]
    found = scrape(metrics)
    assert (found["sequences_running"], found["sequences_waiting"]) == (3, 2)
    assert (found["slot_usage_ratio"], found["kv_cache_usage_ratio"]) == (0.75, 0.5)
    now[0] = Occupancy(running=0, waiting=0, slots=4, tokens=0, places=200)
    assert scrape(metrics)["kv_cache_usage_ratio"] == 0
    metrics.generation.retire("tales", "3")
    assert "sequences_running" not in scrape(metrics)
    assert "prompt_tokens_total" in scrape(metrics)  # a counter goes on
