"""A dashboard as a picture: drawn by matplotlib from its file and from what Prometheus answers to its queries.

It is no screenshot: Grafana has no part in it. Places, titles, units, legends and colours are those of the file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from deploy.grafana.questions import filled, legend
from deploy.grafana.units import shown
from deploy.prometheus.local import Prometheus, Series

# Grafana's dark theme and its classic palette.
CANVAS, CARD, EDGE, TEXT, FAINT, LINES = "#111217", "#181b1f", "#2c2f35", "#ccccdc", "#8e8e9b", "#26292f"
PALETTE = (
    "#7EB26D", "#EAB839", "#6ED0E0", "#EF843C", "#E24D42", "#1F78C1", "#BA43A9", "#705DA0", "#508642", "#CCA300",
)  # fmt: skip
WIDTH, UNIT, GAP, COLUMNS = 1600, 36, 8, 24
TITLE, LEGEND_LINE, MOST_LEGENDS = 26, 15, 5
GRADIENT = ("#2b1a12", "#7f2704", "#d94801", "#fd8d3c", "#fdd0a2")
POINTS = 240


class Box(NamedTuple):
    """A part of the picture, in pixels from the upper left corner."""

    left: float
    top: float
    width: float
    height: float


class Line(NamedTuple):
    name: str
    color: str
    series: Series


class Span(NamedTuple):
    """Unix seconds."""

    start: float
    end: float

    @property
    def step(self) -> float:
        return max(1.0, round((self.end - self.start) / POINTS))


class Picture:
    """A figure that is drawn on by pixels."""

    def __init__(self, height: float) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor=CANVAS)

    def axes(self, box: Box) -> Axes:
        below = self.height - box.top - box.height
        place = (box.left / WIDTH, below / self.height, box.width / WIDTH, box.height / self.height)
        made = self.figure.add_axes(place, facecolor="none")
        for side in made.spines.values():
            side.set_visible(False)
        return made

    def write(self, left: float, top: float, words: str, **style: Any) -> None:
        whole: dict[str, Any] = {"color": TEXT, "fontsize": 9, "va": "top", "ha": "left", **style}
        self.figure.text(left / WIDTH, 1 - top / self.height, words, **whole)

    def card(self, box: Box) -> None:
        place = (box.left / WIDTH, 1 - (box.top + box.height) / self.height)
        shape = FancyBboxPatch(
            place,
            box.width / WIDTH,
            box.height / self.height,
            boxstyle="round,pad=0,rounding_size=0.001",
            transform=self.figure.transFigure,
            facecolor=CARD,
            edgecolor=EDGE,
            linewidth=0.8,
            zorder=-2,
        )
        self.figure.add_artist(shape)

    def mark(self, left: float, top: float, color: str) -> None:
        size = (10 / WIDTH, 3 / self.height)
        place = (left / WIDTH, 1 - (top + 7) / self.height)
        transform = self.figure.transFigure
        self.figure.add_artist(Rectangle(place, *size, transform=transform, facecolor=color, edgecolor="none"))

    def save(self, path: Path) -> None:
        """As a PNG of few colours, which is a third of the size."""
        file = io.BytesIO()
        self.figure.savefig(file, facecolor=CANVAS)
        image = Image.open(file).convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, optimize=True)


def draw(
    dashboard: Mapping[str, Any], prometheus: Prometheus, values: Mapping[str, str], span: Span, path: Path
) -> None:
    """Every panel over `span`. values: of the template variables."""
    panels = dashboard["panels"]
    head = 56
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    picture = Picture(head + bottom * UNIT + GAP)
    picture.write(GAP + 4, 12, dashboard["title"], fontsize=15, fontweight="bold")
    times = " - ".join(f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}" for moment in span)
    picture.write(WIDTH - GAP - 4, 16, times, ha="right", color=FAINT)
    picture.write(GAP + 4, 36, dashboard["description"], color=FAINT)
    with mpl.rc_context({"font.family": "DejaVu Sans", "axes.edgecolor": EDGE}):
        for panel in panels:
            at = panel["gridPos"]
            column = (WIDTH - GAP) / COLUMNS
            box = Box(GAP + at["x"] * column, head + at["y"] * UNIT, at["w"] * column - GAP, at["h"] * UNIT - GAP)
            if panel["type"] == "row":
                picture.write(box.left + 2, box.top + 8, f"▾  {panel['title']}", fontsize=11, fontweight="bold")
            else:
                _panel(picture, box, panel, prometheus, values, span)
    picture.save(path)


def _panel(
    picture: Picture, box: Box, panel: Mapping[str, Any], prometheus: Prometheus, values: Mapping[str, str], span: Span
) -> None:
    picture.card(box)
    picture.write(box.left + 10, box.top + 8, panel["title"], fontsize=9.5, fontweight="bold")
    inner = Box(box.left + 12, box.top + TITLE, box.width - 24, box.height - TITLE - 10)
    if panel["type"] == "table":
        _table(picture, inner, panel, _instant(panel, prometheus, values, span))
        return
    lines = _lines(panel, prometheus, values, span)
    if not lines:
        picture.write(inner.left + inner.width / 2, inner.top + inner.height / 2, "No data", color=FAINT, ha="center")
    elif panel["type"] == "stat":
        _stat(picture, inner, panel, lines, span)
    elif panel["type"] == "heatmap":
        _heatmap(picture, inner, panel, lines, span)
    else:
        _timeseries(picture, inner, panel, lines, span)


def _lines(panel: Mapping[str, Any], prometheus: Prometheus, values: Mapping[str, str], span: Span) -> list[Line]:
    """What there is, each with the colour that Grafana would give it."""
    fixed = [
        (re.compile(override["matcher"]["options"].strip("/")), override["properties"][0]["value"]["fixedColor"])
        for override in panel["fieldConfig"]["overrides"]
    ]
    found = []
    for target in panel["targets"]:
        for series in prometheus.over(filled(target["expr"], values), span.start, span.end, span.step):
            if series.values:
                found.append((legend(target["legendFormat"], series.labels), series))
    lines = []
    for place, (name, series) in enumerate(sorted(found, key=lambda one: one[0])):
        overrides = [color for pattern, color in fixed if pattern.search(name)]  # the last one counts
        lines.append(Line(name, overrides[-1] if overrides else PALETTE[place % len(PALETTE)], series))
    return lines


def _instant(
    panel: Mapping[str, Any], prometheus: Prometheus, values: Mapping[str, str], span: Span
) -> list[dict[str, str]]:
    return [
        series.labels
        for target in panel["targets"]
        for series in prometheus.at(filled(target["expr"], values), span.end)
    ]


def _timeseries(picture: Picture, box: Box, panel: Mapping[str, Any], lines: Sequence[Line], span: Span) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    custom = panel["fieldConfig"]["defaults"]["custom"]
    listed = sorted(lines, key=lambda line: -line.series.values[-1])[:MOST_LEGENDS]
    room = LEGEND_LINE * (len(listed) + (len(lines) > len(listed)))
    axes = picture.axes(Box(box.left + 52, box.top + 4, box.width - 56, box.height - room - 30))
    _times(axes, span)
    if custom["stacking"]["mode"] == "normal":
        moments = np.arange(span.start, span.end + span.step / 2, span.step)
        heights = [np.nan_to_num(_on(line.series, moments)) for line in lines]
        axes.stackplot(moments, heights, colors=[line.color for line in lines], alpha=0.6, linewidth=0)
        for line, above in zip(lines, np.cumsum(heights, axis=0), strict=True):
            axes.plot(moments, above, color=line.color, linewidth=0.9)
    else:
        for line in lines:
            moments = np.arange(span.start, span.end + span.step / 2, span.step)
            numbers = _on(line.series, moments)
            axes.plot(moments, numbers, color=line.color, linewidth=1.1)
            axes.fill_between(moments, numbers, color=line.color, alpha=0.08, linewidth=0)
    _values(axes, panel, unit)
    top = box.top + box.height - room + 2
    for line in listed:
        picture.mark(box.left, top, line.color)
        picture.write(box.left + 16, top, line.name[:60], fontsize=7.5)
        picture.write(box.left + box.width, top, shown(line.series.values[-1], unit), fontsize=7.5, ha="right")
        top += LEGEND_LINE
    if len(lines) > len(listed):
        picture.write(box.left + 16, top, f"and {len(lines) - len(listed)} more", fontsize=7.5, color=FAINT)


def _on(series: Series, moments: np.ndarray) -> np.ndarray:
    """Values at the moments that were asked for; NaN where there was none."""
    found = np.full(len(moments), np.nan)
    places = np.rint((np.array(series.times) - moments[0]) / (moments[1] - moments[0])).astype(int)
    inside = (places >= 0) & (places < len(moments))
    found[places[inside]] = np.array(series.values)[inside]
    return found


def _times(axes: Axes, span: Span) -> None:
    axes.set_xlim(span.start, span.end)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda moment, _: f"{datetime.fromtimestamp(moment):%H:%M:%S}"))
    axes.tick_params(colors=FAINT, labelsize=7, length=0)
    axes.grid(color=LINES, linewidth=0.8)
    axes.set_axisbelow(True)


def _values(axes: Axes, panel: Mapping[str, Any], unit: str) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    if defaults["custom"]["scaleDistribution"]["type"] == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        low, high = axes.dataLim.intervaly
        highest = defaults.get("max", 1.05 * high or 1)
        axes.set_ylim(low if low < 0 else 0, highest)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))


def _stat(picture: Picture, box: Box, panel: Mapping[str, Any], lines: Sequence[Line], span: Span) -> None:
    (line, *_) = lines
    value = line.series.values[-1]
    color = "#73BF69"
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            color = step["color"]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    picture.write(box.left + box.width / 2, box.top + 14, shown(value, unit), fontsize=21, color=color, ha="center")
    axes = picture.axes(Box(box.left, box.top + box.height - 34, box.width, 34))
    axes.set_axis_off()
    axes.fill_between(line.series.times, line.series.values, color=color, alpha=0.15, linewidth=0)
    axes.plot(line.series.times, line.series.values, color=color, linewidth=0.9, alpha=0.7)
    axes.set_xlim(span.start, span.end)
    axes.set_ylim(0, max(line.series.values) * 1.1 or 1)


def _heatmap(picture: Picture, box: Box, panel: Mapping[str, Any], lines: Sequence[Line], span: Span) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    moments = np.arange(span.start, span.end + span.step / 2, span.step)
    ordered = sorted(lines, key=lambda line: float(line.series.labels["le"]))
    sums = np.array([np.nan_to_num(_on(line.series, moments)) for line in ordered])
    counts = np.diff(sums, axis=0, prepend=np.zeros((1, len(moments)))).clip(0)
    seen = np.flatnonzero(counts.sum(axis=1) > 0)
    if not len(seen):
        picture.write(box.left + box.width / 2, box.top + box.height / 2, "No data", color=FAINT, ha="center")
        return
    first, last = max(seen[0] - 1, 0), min(seen[-1] + 2, len(ordered))
    counts, ordered = counts[first:last], ordered[first:last]
    axes = picture.axes(Box(box.left + 52, box.top + 4, box.width - 56, box.height - 26))
    _times(axes, span)
    axes.grid(visible=False)
    scale = mpl.colors.LinearSegmentedColormap.from_list("oranges", GRADIENT)
    edges = np.append(moments - span.step / 2, moments[-1] + span.step / 2)
    hidden = np.ma.masked_equal(counts, 0)
    power = mpl.colors.PowerNorm(0.5)
    axes.pcolormesh(edges, np.arange(len(ordered) + 1), hidden, cmap=scale, norm=power, edgecolors=CARD, linewidth=0.3)
    axes.set_yticks(np.arange(len(ordered)) + 1.0)
    names = [line.series.labels["le"] for line in ordered]
    axes.set_yticklabels(["+Inf" if name == "+Inf" else shown(float(name), unit) for name in names])
    if len(ordered) > 8:
        for place, label in enumerate(axes.get_yticklabels()):
            label.set_visible(place % 2 == 1)


def _table(picture: Picture, box: Box, panel: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> None:
    organize = next(step for step in panel["transformations"] if step["id"] == "organize")["options"]
    columns = sorted(organize["indexByName"], key=organize["indexByName"].__getitem__)
    if not rows:
        picture.write(box.left + box.width / 2, box.top + box.height / 2, "No data", color=FAINT, ha="center")
        return
    width, line = box.width / len(columns), 20
    most = int(box.height // line) - 1
    ordered = sorted(rows, key=lambda row: [row.get(column, "") for column in columns])
    for place, column in enumerate(columns):
        left = box.left + place * width
        picture.write(left, box.top + 2, organize["renameByName"][column], color=FAINT, fontsize=8.5)
        for number, row in enumerate(ordered[:most]):
            picture.write(left, box.top + 2 + line * (number + 1), row.get(column, "")[:40], fontsize=8.5)
