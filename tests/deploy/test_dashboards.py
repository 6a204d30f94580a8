"""The dashboards' files: as the code makes them, complete, and consistent with what provisions them."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.files import DASHBOARDS, FOLDER, text
from deploy.grafana.questions import VARIABLE, filled, legend, questions

FILES = sorted(FOLDER.glob("*.json"))


def panels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["panels"]
    return found


def test_the_files_are_what_the_code_makes() -> None:
    made = {f"{name}.json": text(dashboard) for name, dashboard in DASHBOARDS.items()}
    assert {path.name: path.read_text(encoding="utf-8") for path in FILES} == made, "run python -m deploy.grafana.files"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_lie_side_by_side_within_the_grid(path: Path) -> None:
    places = [panel["gridPos"] for panel in panels(path)]
    assert all(at["x"] >= 0 and at["x"] + at["w"] <= 24 for at in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows_and_in_which_unit(path: Path) -> None:
    shown = [panel for panel in panels(path) if panel["type"] != "row"]
    assert len({panel["id"] for panel in panels(path)}) == len(panels(path))
    for panel in shown:
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_legends_name_labels_that_the_query_keeps(path: Path) -> None:
    for panel in panels(path):
        for target in panel.get("targets", ()):
            kept = {label for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in re.split(r",\s*", by)}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, panel["title"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_variable_that_is_asked_for_is_there_and_every_one_there_is_asked_for(path: Path) -> None:
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    asked = {
        found[1] or found[2]
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        for found in VARIABLE.finditer(target["expr"] + target["datasource"]["uid"])
    }
    assert asked - {"__rate_interval"} == variables


def test_variables_are_filled_in_whichever_way_they_are_written() -> None:
    expr = 'rate(a{model=~"$model", b="${job}"}[$__rate_interval])'
    values = {"model": "x|y", "job": "z", "__rate_interval": "1m"}
    assert filled(expr, values) == 'rate(a{model=~"x|y", b="z"}[1m])'
    assert legend("{{model}} p99", {"model": "x"}) == "x p99"
    dashboard = {"panels": [{"type": "row", "title": "r"}, {"type": "stat", "title": "t", "targets": [
        {"expr": "$job", "legendFormat": "l"}
    ]}]}  # fmt: skip
    assert [tuple(question) for question in questions(dashboard, values)] == [("t", "stat", "z", "l")]


def test_grafana_finds_the_dashboards_where_compose_puts_them() -> None:
    root = FOLDER.parents[1]
    provider = yaml.safe_load((FOLDER.parent / "provisioning/dashboards/espalier.yml").read_text())["providers"][0]
    source = yaml.safe_load((FOLDER.parent / "provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    grafana = yaml.safe_load((root / "compose.yml").read_text())["services"]["grafana"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in grafana["volumes"] if volume.startswith("./"))
    assert provider["options"]["path"] in mounts.values()
    there = next(here for here, inside in mounts.items() if inside == provider["options"]["path"])
    assert (root / there).resolve() == FOLDER
    assert "/etc/grafana/provisioning" in mounts.values()
    assert source["url"] == "${PROMETHEUS_URL}"
    assert grafana["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
