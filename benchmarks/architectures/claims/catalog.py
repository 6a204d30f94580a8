"""All claims, in the order of the document."""

from __future__ import annotations

from benchmarks.architectures.claims import attention, cells, depth, overfitting, separable, skips
from benchmarks.architectures.claims.claim import Claim

CLAIMS: tuple[Claim, ...] = (separable.CLAIM, cells.CLAIM, skips.CLAIM, depth.CLAIM, attention.CLAIM, overfitting.CLAIM)
