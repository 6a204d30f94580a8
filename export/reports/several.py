"""How good each of several heads is on held-out data."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
from PIL import Image

from export.reports.evaluation import Evaluation


class SeveralReport(msgspec.Struct, frozen=True, kw_only=True):
    """samples: with a label for any head; each head's report is on those with a label for it. loss: of all heads
    together, as the objective sums them up."""

    samples: int
    loss: float
    heads: dict[str, Evaluation]

    def figures(self) -> dict[str, float]:
        """The single numbers; those of a head are called "<head>.<figure>"."""
        own = {
            f"{head}.{name}": value for head, report in self.heads.items() for name, value in report.figures().items()
        }
        return {"loss": self.loss, **own}

    def plot(self, path: Path) -> None:
        """The pictures of all heads, one below the other, as one PNG."""
        with tempfile.TemporaryDirectory() as folder:
            pictures = []
            for i, report in enumerate(self.heads.values()):
                report.plot(Path(folder) / f"{i}.png")
                with Image.open(Path(folder) / f"{i}.png") as picture:
                    pictures.append(picture.convert("RGB"))
        whole = Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)), "white")
        top = 0
        for one in pictures:
            whole.paste(one, (0, top))
            top += one.height
        whole.save(path)

    def words(self) -> str:
        return "\n\n".join(
            f"### Head `{head}`, {report.samples} samples\n\n{report.words()}" for head, report in self.heads.items()
        )
