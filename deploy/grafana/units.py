"""Numbers as Grafana writes them, by the names that it has for units."""

from __future__ import annotations

SMALLER = ((1.0, "s", 1.0), (1e-3, "ms", 1e3), (1e-6, "µs", 1e6), (0.0, "ns", 1e9))
LARGER = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))
BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
DECIMAL = ("", " K", " Mil", " Bil")
RATES = {"reqps": "req/s", "rowsps": "rows/s", "ops": "ops/s", "watt": "W", "celsius": "°C"}


def shown(value: float, unit: str) -> str:
    """unit: one that the dashboards use; of another the bare number."""
    if unit == "s":
        return seconds(value)
    if unit == "percentunit":
        return f"{digits(100 * value)} %"
    if unit == "bytes":
        power = 0
        while abs(value) >= 1024 and power + 1 < len(BINARY):
            value, power = value / 1024, power + 1
        return f"{digits(value)} {BINARY[power]}"
    if unit == "sci":
        return f"{value:.2g}"
    power = 0
    while abs(value) >= 1000 and power + 1 < len(DECIMAL):
        value, power = value / 1000, power + 1
    return f"{digits(value)}{DECIMAL[power]} {RATES.get(unit, '')}".rstrip()


def seconds(value: float) -> str:
    for least, name in LARGER:
        if abs(value) >= least:
            return f"{digits(value / least)} {name}"
    if value == 0:
        return "0 s"
    _, name, factor = next(step for step in SMALLER if abs(value) >= step[0])
    return f"{digits(value * factor)} {name}"


def digits(value: float) -> str:
    """Three that count, without zeros at the end."""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "0" if text in ("-0", "0") else text
