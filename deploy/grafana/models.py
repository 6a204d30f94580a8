"""The dashboard of models and their versions."""

from __future__ import annotations

from deploy.grafana.layout import (
    GREEN,
    ORANGE,
    RED,
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
    VERSION,
    VERSIONS,
    mean,
    quantile,
    rate,
    share,
)

MODELS = Dashboard(
    uid="espalier-models",
    title="Espalier / Models",
    words="Which versions are served, how traffic is split between them, and what loading them costs.",
    variables=[JOB, INSTANCE, MODEL_NAMES, VERSIONS],
    rows=[
        Row(
            "Now",
            [
                Panel(
                    "Models",
                    "Names that are served.",
                    "short",
                    [Query(f"count(count by (model) (espalier_model_info{{{VERSION}}}))", "models")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Versions",
                    "Versions in memory.",
                    "short",
                    [Query(f"count(count by (model, version) (espalier_model_info{{{VERSION}}}))", "versions")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Memory",
                    "Of all sessions, as estimated when they were loaded.",
                    "bytes",
                    [Query(f"sum(espalier_session_memory_bytes{{{VERSION}}})", "sessions")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Loaded",
                    "Versions that were verified, loaded and warmed up since the servers started.",
                    "short",
                    [Query(f'sum(espalier_model_loads_total{{{MODEL}, outcome="loaded"}})', "loaded")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Failed loads",
                    "Of those, that failed: the version before goes on.",
                    "short",
                    [Query(f'sum(espalier_model_loads_total{{{MODEL}, outcome="failed"}}) or vector(0)', "failed")],
                    kind="stat",
                    width=4,
                    thresholds=[(0.5, RED)],
                ),
                Panel(
                    "Refused bundles",
                    "Versions that were damaged or did not load, since the server started.",
                    "short",
                    [Query(f"sum(espalier_bundles_refused_total{{{MODEL}}}) or vector(0)", "refused")],
                    kind="stat",
                    width=4,
                    thresholds=[(0.5, RED)],
                ),
            ],
        ),
        Row(
            "Versions",
            [
                Panel(
                    "Served",
                    "Every version in memory.",
                    "short",
                    [Query(f"max by (model, version, task, provider) (espalier_model_info{{{VERSION}}})", "")],
                    kind="table",
                    width=14,
                    columns={"model": "Model", "version": "Version", "task": "Task", "provider": "Provider"},
                ),
                Panel(
                    "Aliases",
                    "Which version a name stands for.",
                    "short",
                    [Query(f"max by (model, alias, version) (espalier_alias_info{{{MODEL}}})", "")],
                    kind="table",
                    width=10,
                    columns={"model": "Model", "alias": "Alias", "version": "Version"},
                ),
                Panel(
                    "Traffic by version",
                    "Answered requests a second: the split as it is.",
                    "reqps",
                    [Query(rate("espalier_request_seconds_count", VERSION, "model, version"), "{{model}} {{version}}")],
                    stacked=True,
                ),
                Panel(
                    "p99 by version",
                    "Whether a new version is slower.",
                    "s",
                    [
                        Query(
                            quantile(0.99, "espalier_request_seconds", VERSION, "model, version"),
                            "{{model}} {{version}}",
                        )
                    ],
                ),
                Panel(
                    "Time of a run by version",
                    "Mean time in inference.",
                    "s",
                    [
                        Query(
                            mean("espalier_stage_seconds", f'{VERSION}, stage="inference"', "model, version"),
                            "{{model}} {{version}}",
                        )
                    ],
                ),
                Panel(
                    "Versions in memory",
                    "By model: two while one takes over from another.",
                    "short",
                    [Query(f"count by (model) (espalier_model_info{{{VERSION}}})", "{{model}}")],
                ),
                Panel(
                    "Shadow requests",
                    "Requests also asked of a version that does not answer them, and whether its answer was the same.",
                    "reqps",
                    [
                        Query(
                            rate("espalier_shadow_requests_total", VERSION, "model, version, outcome"),
                            "{{model}} {{version}} {{outcome}}",
                        )
                    ],
                    stacked=True,
                    colors={" same$": GREEN, " different$": ORANGE, " failed$": RED},
                ),
                Panel(
                    "Shadow answers that differ",
                    "Share of them, failed ones with them.",
                    "percentunit",
                    [
                        Query(
                            share(
                                rate(
                                    "espalier_shadow_requests_total",
                                    f'{VERSION}, outcome!="same"',
                                    "model, version",
                                ),
                                rate("espalier_shadow_requests_total", VERSION, "model, version"),
                            ),
                            "{{model}} {{version}}",
                        )
                    ],
                    most=1,
                ),
            ],
        ),
        Row(
            "Loading and memory",
            [
                Panel(
                    "Time to load",
                    "To verify, load and warm up.",
                    "s",
                    [
                        Query(
                            f"max by (model, version) (espalier_model_load_seconds{{{VERSION}}})",
                            "{{model}} {{version}}",
                        )
                    ],
                ),
                Panel(
                    "Loads",
                    "Since the server started; a failed one is tried again when its files change.",
                    "short",
                    [Query(f"sum by (outcome) (espalier_model_loads_total{{{MODEL}}})", "{{outcome}}")],
                    colors={"loaded": GREEN, "failed": RED},
                ),
                Panel(
                    "Memory of sessions",
                    "As estimated when they were loaded.",
                    "bytes",
                    [
                        Query(
                            f"sum by (model, version) (espalier_session_memory_bytes{{{VERSION}}})",
                            "{{model}} {{version}}",
                        )
                    ],
                    stacked=True,
                ),
                Panel(
                    "Evictions",
                    "Models put out of memory for others, in an hour. Many: what they may take is too small.",
                    "short",
                    [Query(f"sum by (model) (increase(espalier_model_evictions_total{{{MODEL}}}[1h]))", "{{model}}")],
                    width=12,
                ),
                Panel(
                    "Refused bundles",
                    "Versions that were damaged or did not load, by model, since the server started.",
                    "short",
                    [Query(f"sum by (model) (espalier_bundles_refused_total{{{MODEL}}})", "{{model}}")],
                    width=12,
                ),
            ],
        ),
    ],
)
