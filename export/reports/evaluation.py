"""What is found out about a network on held-out data, whatever its task."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Evaluation(Protocol):
    """A msgspec Struct that becomes evaluation.json."""

    @property
    def samples(self) -> int:
        """How many were looked at."""

    def figures(self) -> dict[str, float]:
        """The single numbers, by name; "loss" is among them."""

    def plot(self, path: Path) -> None:
        """A picture as a PNG file."""

    def words(self) -> str:
        """Markdown for the model card."""
