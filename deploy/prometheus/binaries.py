"""Where Prometheus's programs are: unpacked into this environment by fetch.sh, or installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

UNPACKED = Path(sys.prefix) / "prometheus" / "usr" / "bin"


def find(program: str) -> str | None:
    """program: "prometheus" or "promtool"; None where it is nowhere."""
    return shutil.which(program, path=UNPACKED) or shutil.which(program)
