"""docs/architectures.md, written from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from benchmarks.architectures.claims.claim import Section
from benchmarks.architectures.compare import Compared
from benchmarks.architectures.pictures import Picture, table

HEADER = (
    *("architecture", "task", "data", "parameters", "multiply-adds", "training, s"),
    *("metric", "network", "baseline", "", "parity", "served, ms"),
)
# Of the pictures, beside the document.
FOLDER = "architectures"
# From the left, those that are words.
WORDS = 3


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """cores: that the run could use. processes: runs side by side, one thread each. minutes: of the whole run."""

    cores: int
    memory_gib: float
    processes: int
    minutes: float
    versions: Mapping[str, str]


def write(
    rows: Sequence[Compared],
    sections: Sequence[Section],
    gallery: Sequence[Picture],
    missing: Mapping[str, str],
    machine: Machine,
) -> str:
    """Markdown. missing: why a row or claim was not measured, by its name."""
    behind = [row.title for row in rows if not row.beats]
    verdict = (
        "**Not every row beats its baseline: " + ", ".join(behind) + ".**"
        if behind
        else "Every row beats its baseline."
    )
    failed = [section.title for section in sections if not section.holds]
    claims = "**Not in full as claimed: " + "; ".join(failed) + ".**" if failed else "All claims came out as they say."
    parts = [
        f"""# Architectures, measured

Written by `make architectures`, which trains every architecture by a recipe through the one path (data file, training,
ONNX export, parity check, publication), asks the published model over HTTP, and compares it with a simple baseline on
the same held-out items. Everything here was measured in {machine.minutes:.0f} minutes (all sittings together, if it \
was interrupted) on a machine with {machine.cores} CPU cores
and {machine.memory_gib:.0f} GiB of memory, without a GPU; {machine.processes} trainings ran side by side, one thread \
each. {", ".join(f"{name} {version}" for name, version in machine.versions.items())}.

{verdict} {claims}""",
        f"""## Every architecture against a baseline

{table(HEADER, [line(row) for row in rows], WORDS)}

- The networks are small on purpose (narrow, few pixels, few epochs): each trains in seconds on one core. The table
  says that each one learns, exports and serves, not which is best.
- metric: on test items that neither the network nor the baseline has seen (a fifth of the data unless the recipe says
  otherwise; the baseline learns from the training and the validation items).
- multiply-adds: of one item, counted in the exported ONNX graphs by the shapes that ONNX Runtime saw: convolutions,
  matrix products (linear layers and attention) and recurrent cells; norms, activations and look-ups are not counted.
  For series and texts of the median length, which is in brackets. Of several graphs: that which reads, and that which
  writes its first token.
- translation: a message that is held out in one language may have been learned from another, so the figures flatter;
  on messages that are new in all languages they are those of the section on attention.
- training: seconds on one thread, from the first step to the test.
- parity: largest difference between PyTorch and ONNX Runtime on validation items at several batch sizes and lengths.
- served: median of single requests over HTTP, one at a time, to one server that holds all of these models.""",
    ]
    if sections:
        parts.append("## What is said of them, measured")
    for section in sections:
        parts.append(f"### {section.title}{'' if section.holds else ': not in full here'}\n\n{section.text}")
        parts += [shown(picture) for picture in section.pictures]
    if gallery:
        parts += ["## What they look like", *(f"{shown(picture)}\n\n{picture.caption}." for picture in gallery)]
    if missing:
        parts.append("## Not measured\n\n" + "\n".join(f"- {name}: {why}" for name, why in missing.items()))
    return "\n\n".join(parts) + "\n"


def shown(picture: Picture) -> str:
    return f"![{picture.caption}]({FOLDER}/{picture.file})"


def line(row: Compared) -> tuple[str, ...]:
    one = row.trained
    counted = " + ".join(short(count) for count in one.multiply_adds.values())
    return (
        row.title,
        row.task,
        row.data,
        f"{one.parameters:,}",
        f"{counted} ({one.length})" if one.length else counted,
        f"{one.seconds:.0f}",
        row.metric.replace("_", " ") + ("" if row.better == "more" else " (less is better)"),
        f"**{row.figure:.3f}**" if row.beats else f"{row.figure:.3f}",
        f"{row.baseline_figure:.3f}",
        row.baseline,
        f"{one.difference:.0e}",
        f"{row.latency.p50:.1f}",
    )


def short(count: int) -> str:
    """12.3 k, 4.5 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)
