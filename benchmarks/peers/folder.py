"""Where environments, models and unfinished results stay, unless another folder is named."""

from pathlib import Path

KEPT = Path.home() / ".cache" / "espalier-peers"
