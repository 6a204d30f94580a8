"""What a dashboard is made of, and how Grafana wants it written (schema 39: Grafana 11 and newer)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["timeseries", "stat", "table", "heatmap"]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
HEIGHTS: dict[Kind, int] = {"timeseries": 8, "stat": 4, "table": 8, "heatmap": 8}
GREEN, YELLOW, ORANGE, RED, BLUE, PURPLE, GREY = (
    "#73BF69",
    "#F2CC0C",
    "#FF9830",
    "#F2495C",
    "#5794F2",
    "#B877D9",
    "#808080",
)


class Query(NamedTuple):
    """expr: PromQL. legend: what a series is called, {{label}} filled in."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """words: what it shows and what to make of it. unit: Grafana's name of one. most: the axis ends there.
    stacked: series add up. colors: of series by regular expression. thresholds: of a stat, the colour from a value on.
    columns: of a table, heading by label, in their order."""

    title: str
    words: str
    unit: str
    queries: Sequence[Query]
    kind: Kind = "timeseries"
    width: int = 8
    stacked: bool = False
    most: float | None = None
    logarithmic: bool = False
    colors: Mapping[str, str] = field(default_factory=dict)
    thresholds: Sequence[tuple[float, str]] = ()
    columns: Mapping[str, str] = field(default_factory=dict)


class Row(NamedTuple):
    title: str
    panels: Sequence[Panel]


class Variable(NamedTuple):
    """One of those at the top. query: label_values(…) of Grafana's Prometheus data source."""

    name: str
    label: str
    query: str


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    words: str
    variables: Sequence[Variable]
    rows: Sequence[Row]


def written(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana reads it from a file."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.words,
        "tags": ["espalier"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [
            {
                "title": "Espalier",
                "type": "dashboards",
                "tags": ["espalier"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "annotations": {"list": [_alerts()]},
        "templating": {"list": [_datasource(), *map(_variable, dashboard.variables)]},
        "panels": list(_panels(dashboard.rows)),
    }


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": RED,
        "expr": 'ALERTS{alertname=~"Espalier.*", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{severity}} {{model}} {{instance}}",
        "step": "30s",
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": variable.query, "refId": variable.name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def _panels(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Rows from the top down, panels from the left to the right, each where the one before ends."""
    identity, top = 0, 0
    for row in rows:
        identity += 1
        at = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        yield {"id": identity, "type": "row", "title": row.title, "collapsed": False, "gridPos": at, "panels": []}
        top += 1
        left = tallest = 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, tallest = top + tallest, 0, 0
            identity += 1
            height = HEIGHTS[panel.kind]
            at = {"x": left, "y": top, "w": panel.width, "h": height}
            yield {"id": identity, "gridPos": at, **_panel(panel)}
            left, tallest = left + panel.width, max(tallest, height)
        top += tallest


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "color": {"mode": "palette-classic"}}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind in ("timeseries", "stat"):
        defaults["min"] = 0
    options: dict[str, Any] = {}
    made: dict[str, Any] = {}
    match panel.kind:
        case "timeseries":
            defaults["custom"] = {
                "drawStyle": "line",
                "lineWidth": 1,
                "fillOpacity": 60 if panel.stacked else 8,
                "showPoints": "never",
                "spanNulls": False,
                "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
                "scaleDistribution": {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"},
            }
            if panel.logarithmic:
                del defaults["min"]
            options = {
                "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
        case "stat":
            steps = [{"color": GREEN, "value": None}, *({"color": c, "value": v} for v, c in panel.thresholds)]
            defaults |= {"color": {"mode": "thresholds"}, "thresholds": {"mode": "absolute", "steps": steps}}
            options = {
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                "colorMode": "value",
                "graphMode": "area",
                "textMode": "auto",
                "justifyMode": "auto",
            }
        case "table":
            options = {"showHeader": True, "cellHeight": "sm"}
            named = {**panel.columns, "Value": panel.columns.get("Value", "Value")}
            hidden = {"Time": True} | ({} if "Value" in panel.columns else {"Value": True})
            order = {label: place for place, label in enumerate(panel.columns)}
            kept = {"include": {"names": list(panel.columns)}}
            made["transformations"] = [
                {"id": "filterFieldsByName", "options": kept},
                {"id": "organize", "options": {"excludeByName": hidden, "indexByName": order, "renameByName": named}},
            ]
        case "heatmap":
            options = {
                "calculate": False,
                "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "scale": "exponential", "exponent": 0.5},
                "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
                "cellGap": 1,
                "legend": {"show": True},
                "tooltip": {"mode": "single", "yHistogram": False},
            }
    overrides = [
        {
            "matcher": {"id": "byRegexp", "options": f"/{pattern}/"},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": color}}],
        }
        for pattern, color in panel.colors.items()
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.words,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": options,
        "targets": [_target(panel, query, chr(ord("A") + place)) for place, query in enumerate(panel.queries)],
        **made,
    }


def _target(panel: Panel, query: Query, reference: str) -> dict[str, Any]:
    form = {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series")
    instant = panel.kind == "table"
    return {
        "refId": reference,
        "datasource": DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "format": form,
        "instant": instant,
        "range": not instant,
        "editorMode": "code",
    }
