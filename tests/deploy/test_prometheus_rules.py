"""Prometheus's own tool reads every configuration and rule, and runs the rules' tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.prometheus.local import program

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
PROMTOOL = program("promtool")

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here; deploy/prometheus/fetch.sh unpacks it")


def promtool(*words: str | Path) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("name", ["prometheus.yml", "static.yml"])
def test_configurations_are_valid_and_find_their_rules(name: str) -> None:
    promtool("check", "config", "--lint-fatal", FOLDER / name)


@needs_promtool
@pytest.mark.parametrize("name", ["recording", "alerts"])
def test_rules_make_of_known_series_what_they_should(name: str) -> None:
    promtool("check", "rules", "--lint-fatal", FOLDER / "rules" / f"{name}.yml")
    promtool("test", "rules", FOLDER / "tests" / f"{name}.test.yml")


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    groups = yaml.safe_load((FOLDER / "rules" / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    cases = yaml.safe_load((FOLDER / "tests" / "alerts.test.yml").read_text())["tests"]
    tried = {(case["alertname"], bool(case["exp_alerts"])) for test in cases for case in test["alert_rule_test"]}
    assert tried == {(alert, fires) for alert in alerts for fires in (True, False)}
