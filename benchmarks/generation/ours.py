"""Our side: SmolLM2 published twice, float32 and int8, and one server for both."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.generation.contenders import listening
from export.untouched import export_backbone

FLOAT32, INT8 = "smollm2", "smollm2-int8"
BACKBONE = "smollm2-135m-instruct"


def publish(repository: Path) -> None:
    """Both bundles, into a repository that is made."""
    export_backbone(BACKBONE, name=FLOAT32, repository=repository, backbones={})
    export_backbone(BACKBONE, name=INT8, repository=repository, backbones={}, kept_as="int8")


@contextmanager
def serving(repository: Path, slots: int) -> Iterator[int]:
    """The port of `espalier serve` without a worker."""
    with tempfile.TemporaryDirectory() as home:
        flags = ["--home", home, "--repository", str(repository), "--no-worker", "--generation-slots", str(slots)]
        with listening([sys.executable, "-m", "server", *flags], "/health/ready") as port:
            yield port


def body(model: str) -> dict[str, Any]:
    """What each request has, beside its prompt and how much it wants. The usage says how many tokens there were."""
    return {"model": model, "stream_options": {"include_usage": True}}
