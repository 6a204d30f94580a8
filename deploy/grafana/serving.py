"""The dashboard of requests."""

from __future__ import annotations

from deploy.grafana.layout import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    YELLOW,
    Dashboard,
    Panel,
    Query,
    Row,
)
from deploy.grafana.queries import (
    INSTANCE,
    JOB,
    MODEL,
    MODEL_NAMES,
    SERVER,
    VERSION,
    VERSIONS,
    mean,
    quantile,
    quantiles,
    rate,
    share,
)

OUTCOMES = {"^2..$": GREEN, "^4..$": YELLOW, "^429$": ORANGE, "^499$": GREY, "^5..$": RED}


REQUESTS = "espalier_requests_total"

HITS = rate("espalier_cache_hits_total", MODEL, "model")
MISSES = rate("espalier_cache_misses_total", MODEL, "model")

SERVING = Dashboard(
    uid="espalier-serving",
    title="Espalier / Serving",
    words="Requests: how many, how fast, what became of them, and where their time goes.",
    variables=[JOB, INSTANCE, MODEL_NAMES, VERSIONS],
    rows=[
        Row(
            "Now",
            [
                Panel(
                    "Requests",
                    "Inference requests a second, whatever became of them.",
                    "reqps",
                    [Query(rate(REQUESTS, MODEL), "requests")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Failed",
                    "Share with a status of 5xx: the server's fault.",
                    "percentunit",
                    [Query(share(rate(REQUESTS, f'{MODEL}, outcome=~"5.."'), rate(REQUESTS, MODEL)), "failed")],
                    kind="stat",
                    width=4,
                    thresholds=[(0.001, YELLOW), (0.01, RED)],
                ),
                Panel(
                    "Turned away",
                    "Share with 429: no room in the queue, or over a limit.",
                    "percentunit",
                    [Query(share(rate(REQUESTS, f'{MODEL}, outcome="429"'), rate(REQUESTS, MODEL)), "429")],
                    kind="stat",
                    width=4,
                    thresholds=[(0.01, YELLOW), (0.1, RED)],
                ),
                Panel(
                    "p50",
                    "Half of the answered requests took less, from first byte to answer.",
                    "s",
                    [Query(quantile(0.5, "espalier_request_seconds", VERSION), "p50")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "p99",
                    "One in a hundred answered requests took longer.",
                    "s",
                    [Query(quantile(0.99, "espalier_request_seconds", VERSION), "p99")],
                    kind="stat",
                    width=4,
                    thresholds=[(0.5, YELLOW), (2, RED)],
                ),
                Panel(
                    "Waiting",
                    "Rows that wait for a run of their model.",
                    "short",
                    [Query(f"sum(espalier_queue_rows{{{VERSION}}})", "rows")],
                    kind="stat",
                    width=4,
                    thresholds=[(256, YELLOW), (1024, RED)],
                ),
            ],
        ),
        Row(
            "Requests",
            [
                Panel(
                    "Requests by model",
                    "A request that names no model that is served has none.",
                    "reqps",
                    [Query(rate(REQUESTS, MODEL, "model"), "{{model}}")],
                ),
                Panel(
                    "Requests by outcome",
                    "HTTP status. 4xx is the caller's fault; 429 was turned away, 408 waited past its deadline, 499's "
                    "client went; 5xx is ours.",
                    "reqps",
                    [Query(rate(REQUESTS, MODEL, "outcome"), "{{outcome}}")],
                    stacked=True,
                    colors=OUTCOMES,
                ),
                Panel(
                    "Requests by route",
                    "Where they came in.",
                    "reqps",
                    [Query(rate(REQUESTS, MODEL, "route"), "{{route}}")],
                ),
                Panel(
                    "Failed requests",
                    "Share of each model's requests with a status of 5xx; the objective is 0.1 %.",
                    "percentunit",
                    [
                        Query(
                            share(rate(REQUESTS, f'{MODEL}, outcome=~"5.."', "model"), rate(REQUESTS, MODEL, "model")),
                            "{{model}}",
                        )
                    ],
                ),
                Panel(
                    "Rejected, by reason",
                    "queue_full: as many wait as may. overload: more than the model gets done in time. deadline: "
                    "waited too long. gone: the client went.",
                    "reqps",
                    [Query(rate("espalier_rejected_total", MODEL, "model, reason"), "{{model}} {{reason}}")],
                    stacked=True,
                ),
                Panel(
                    "Waiting rows, and how many may",
                    "The limit follows what the model gets done in time: it falls under overload and rises again.",
                    "short",
                    [
                        Query(f"sum by (model) (espalier_queue_rows{{{VERSION}}})", "{{model}} waiting"),
                        Query(f"sum by (model) (espalier_admitted_limit{{{MODEL}}})", "{{model}} limit"),
                    ],
                    colors={" limit$": GREY},
                ),
            ],
        ),
        Row(
            "Latency",
            [
                Panel(
                    "Latency",
                    "Answered requests, from first byte to answer.",
                    "s",
                    quantiles("espalier_request_seconds", VERSION),
                    colors={"p50": GREEN, "p90": YELLOW, "p99": RED},
                ),
                Panel(
                    "p99 by model",
                    "One in a hundred answered requests took longer.",
                    "s",
                    [Query(quantile(0.99, "espalier_request_seconds", VERSION, "model"), "{{model}}")],
                ),
                Panel(
                    "Latency, all of it",
                    "Requests in every bucket of time: two bands are two kinds of requests.",
                    "s",
                    [
                        Query(
                            f"sum by (le) (increase(espalier_request_seconds_bucket{{{VERSION}}}[$__rate_interval]))",
                            "{{le}}",
                        )
                    ],
                    kind="heatmap",
                ),
                Panel(
                    "Mean time by stage",
                    "Decoding the input, waiting for a run, inference, encoding the answer; added up.",
                    "s",
                    [Query(mean("espalier_stage_seconds", VERSION, "stage"), "{{stage}}")],
                    stacked=True,
                    colors={"decode": BLUE, "queue": ORANGE, "inference": GREEN, "encode": PURPLE},
                ),
                Panel(
                    "p99 by stage",
                    "Which stage makes the slowest requests slow.",
                    "s",
                    [Query(quantile(0.99, "espalier_stage_seconds", VERSION, "stage"), "{{stage}}")],
                    colors={"decode": BLUE, "queue": ORANGE, "inference": GREEN, "encode": PURPLE},
                ),
                Panel(
                    "Time in the queue, p99",
                    "The first sign of too much load; what the number of servers is scaled by.",
                    "s",
                    [
                        Query(
                            quantile(0.99, "espalier_stage_seconds", f'{VERSION}, stage="queue"', "model"), "{{model}}"
                        )
                    ],
                ),
            ],
        ),
        Row(
            "Batches and cache",
            [
                Panel(
                    "Rows of a batch",
                    "How many rows ran together, on average: it rises with load.",
                    "short",
                    [Query(mean("espalier_batch_rows", VERSION, "model"), "{{model}}")],
                ),
                Panel(
                    "Sizes of batches",
                    "Batches in every bucket of size.",
                    "short",
                    [
                        Query(
                            f"sum by (le) (increase(espalier_batch_rows_bucket{{{VERSION}}}[$__rate_interval]))",
                            "{{le}}",
                        )
                    ],
                    kind="heatmap",
                ),
                Panel(
                    "Rows a second",
                    "Inputs that ran; a request may have many.",
                    "rowsps",
                    [Query(rate("espalier_batch_rows_sum", VERSION, "model"), "{{model}}")],
                ),
                Panel(
                    "Cache hits",
                    "Share of rows whose answer was there, of models that have a cache.",
                    "percentunit",
                    [
                        Query(
                            share(HITS, f"({HITS} or 0 * {MISSES}) + {MISSES}"),
                            "{{model}}",
                        )
                    ],
                    most=1,
                ),
                Panel(
                    "Size of the cache",
                    "Answers that are kept.",
                    "bytes",
                    [Query(f"sum by (model) (espalier_cache_bytes{{{MODEL}}})", "{{model}}")],
                ),
                Panel(
                    "Put out of the cache",
                    "Answers a second that made room for newer ones: a larger cache would have kept them.",
                    "ops",
                    [Query(rate("espalier_cache_evictions_total", MODEL, "model"), "{{model}}")],
                ),
            ],
        ),
        Row(
            "Generation",
            [
                Panel(
                    "Tokens a second",
                    "Generated, and read of prompts.",
                    "short",
                    [
                        Query(rate("espalier_generation_tokens_total", VERSION, "model"), "{{model}} generated"),
                        Query(rate("espalier_prompt_tokens_total", VERSION, "model"), "{{model}} read"),
                    ],
                ),
                Panel(
                    "Time to first token",
                    "From the request's arrival, before its text is tokenized.",
                    "s",
                    quantiles("espalier_time_to_first_token_seconds", VERSION),
                    colors={"p50": GREEN, "p90": YELLOW, "p99": RED},
                ),
                Panel(
                    "Time between tokens",
                    "Of one sequence, with the prompts of others that are read in between.",
                    "s",
                    quantiles("espalier_inter_token_latency_seconds", VERSION),
                    colors={"p50": GREEN, "p90": YELLOW, "p99": RED},
                ),
                Panel(
                    "Sequences",
                    "Those that have a slot, and those that wait for one.",
                    "short",
                    [
                        Query(f"sum by (model) (espalier_sequences_running{{{VERSION}}})", "{{model}} running"),
                        Query(f"sum by (model) (espalier_sequences_waiting{{{VERSION}}})", "{{model}} waiting"),
                    ],
                    stacked=True,
                ),
                Panel(
                    "Slots and key/value cache",
                    "Shares that are in use. A full cache makes sequences wait.",
                    "percentunit",
                    [
                        Query(f"max by (model) (espalier_slot_usage_ratio{{{VERSION}}})", "{{model}} slots"),
                        Query(f"max by (model) (espalier_kv_cache_usage_ratio{{{VERSION}}})", "{{model}} cache"),
                    ],
                    most=1,
                ),
                Panel(
                    "Prompts read before",
                    "Share of prompt tokens whose keys and values were there already.",
                    "percentunit",
                    [
                        Query(
                            f"{rate('espalier_prefix_cache_hits_total', VERSION, 'model')} / "
                            f"({rate('espalier_prefix_cache_queries_total', VERSION, 'model')} > 0)",
                            "{{model}}",
                        )
                    ],
                    most=1,
                ),
                Panel(
                    "Finished sequences",
                    "stop: the end, or a stop text. length: the most tokens. abort: the client went, or its time was "
                    "over. error: the network failed.",
                    "ops",
                    [
                        Query(
                            rate("espalier_finished_sequences_total", VERSION, "finished_reason"),
                            "{{finished_reason}}",
                        )
                    ],
                    stacked=True,
                    colors={"stop": GREEN, "length": BLUE, "abort": GREY, "error": RED},
                ),
                Panel(
                    "Where a sequence's time goes",
                    "Mean: waiting for a slot, reading the prompt, writing the answer.",
                    "s",
                    [
                        Query(mean("espalier_request_queue_time_seconds", VERSION, "model"), "{{model}} waiting"),
                        Query(mean("espalier_request_prefill_time_seconds", VERSION, "model"), "{{model}} reading"),
                        Query(mean("espalier_request_decode_time_seconds", VERSION, "model"), "{{model}} writing"),
                    ],
                    stacked=True,
                ),
                Panel(
                    "Tokens of a run",
                    "What one run of the network computed, of prompts and of answers, on average.",
                    "short",
                    [Query(mean("espalier_iteration_tokens", VERSION, "model"), "{{model}}")],
                ),
            ],
        ),
        Row(
            "Doors",
            [
                Panel(
                    "Calls by key",
                    "Of servers that ask for keys: calls by the key's public part.",
                    "reqps",
                    [Query(rate("espalier_key_requests_total", SERVER, "key"), "{{key}}")],
                ),
                Panel(
                    "Calls by what became of them",
                    "unauthorized: no key, or an unknown one. forbidden: not within its scopes. limited: over its rate "
                    "or quota.",
                    "reqps",
                    [Query(rate("espalier_key_requests_total", SERVER, "outcome"), "{{outcome}}")],
                    stacked=True,
                    colors={"admitted": GREEN, "limited": ORANGE, "forbidden": PURPLE, "unauthorized": RED},
                ),
                Panel(
                    "gRPC calls",
                    "By method and status, where gRPC is on.",
                    "reqps",
                    [Query(rate("espalier_grpc_requests_total", SERVER, "method, code"), "{{method}} {{code}}")],
                ),
                Panel(
                    "Requests by front-end",
                    "Of servers with several processes that read requests: they should have about the same.",
                    "reqps",
                    [Query(rate("espalier_frontend_requests_total", SERVER, "instance, frontend"), "{{frontend}}")],
                    width=12,
                ),
                Panel(
                    "Front-ends that answer",
                    "Each that is 0 is down, and is started again.",
                    "short",
                    [Query(f"sum by (instance) (espalier_frontend_up{{{SERVER}}})", "{{instance}}")],
                    width=12,
                ),
            ],
        ),
    ],
)
