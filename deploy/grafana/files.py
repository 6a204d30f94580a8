"""The dashboards, written as Grafana reads them: python -m deploy.grafana.files

A test compares dashboards/*.json with what this makes.
"""

from __future__ import annotations

import json
from pathlib import Path

from deploy.grafana.fine_tuning import FINE_TUNING
from deploy.grafana.hardware import HARDWARE
from deploy.grafana.layout import Dashboard, written
from deploy.grafana.models import MODELS
from deploy.grafana.serving import SERVING

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = {"serving": SERVING, "models": MODELS, "fine_tuning": FINE_TUNING, "hardware": HARDWARE}


def text(dashboard: Dashboard) -> str:
    """A dashboard's file."""
    return json.dumps(written(dashboard), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(text(dashboard), encoding="utf-8")
