"""What a depthwise separable convolution costs of a full one."""

from __future__ import annotations

from benchmarks import convolutions
from benchmarks.architectures.claims.claim import Claim, Finished, Section
from benchmarks.architectures.pictures import table


def measure(finished: Finished) -> Section:
    found = [convolutions.compare(*shape) for shape in convolutions.SHAPES]
    rows = [
        (
            f"{one.inputs} → {one.outputs}",
            f"{one.side} × {one.side}",
            f"{one.formula:.3f}",
            f"{one.counted:.3f}",
            f"{one.full_ms:.2f}",
            f"{one.separable_ms:.2f}",
            f"{one.timed:.3f}",
        )
        for one in found
    ]
    counted = all(abs(one.counted - one.formula) < 1e-9 for one in found)
    slowest, fastest = max(one.timed for one in found), min(one.timed for one in found)
    header = ("channels", "image", "1/d_o + 1/9", "counted", "full, ms", "separable, ms", "timed")
    text = f"""A full 3 × 3 convolution against a depthwise 3 × 3 followed by a 1 × 1, in layers of MobileNet's shapes.

{table(header, rows)}

Counted, the separable one costs exactly 1/d_o + 1/s² of the full one. Timed in ONNX Runtime (one thread,
{convolutions.BATCH} images, median of {convolutions.ROUNDS} rounds in which both take turns) it costs
{fastest:.2f} to {slowest:.2f} of it: more than the count says, since a depthwise convolution does little work for each
number that it reads."""
    title = "A separable convolution costs 1/d_o + 1/s² of a full one"
    return Section(title, counted and slowest < 1.0, text)


CLAIM = Claim("separable", measure)
