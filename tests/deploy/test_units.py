from __future__ import annotations

import pytest

from deploy.grafana.fine_tuning import FINE_TUNING
from deploy.grafana.hardware import HARDWARE
from deploy.grafana.models import MODELS
from deploy.grafana.serving import SERVING
from deploy.grafana.units import shown


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.00123, "s", "1.23 ms"),
        (0.0000021, "s", "2.1 µs"),
        (0, "s", "0 s"),
        (2.5, "s", "2.5 s"),
        (150, "s", "2.5 min"),
        (0.999, "percentunit", "99.9 %"),
        (3 * 2**30, "bytes", "3 GiB"),
        (12_345, "reqps", "12.3 K req/s"),
        (215.5, "watt", "216 W"),
        (54, "celsius", "54 °C"),
        (7, "short", "7"),
        (0.00093, "sci", "0.00093"),
    ],
)
def test_numbers_are_written_as_grafana_does(value: float, unit: str, words: str) -> None:
    assert shown(value, unit) == words


def test_every_unit_of_the_dashboards_is_known() -> None:
    used = {
        panel.unit for board in (SERVING, MODELS, FINE_TUNING, HARDWARE) for row in board.rows for panel in row.panels
    }
    known = {"s", "percentunit", "bytes", "sci", "short", "reqps", "rowsps", "ops", "watt", "celsius"}
    assert used <= known
