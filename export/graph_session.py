"""A graph in ONNX Runtime as an export looks at it: on one provider, with the defaults, without warnings."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from export.bundle import Provider

PROVIDERS: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def opened(graph: Path | bytes, provider: Provider = "cpu") -> onnxruntime.InferenceSession:
    """graph: a file, or what is in one. Raises what ONNX Runtime raises for a graph that it cannot load."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = str(graph) if isinstance(graph, Path) else graph
    return onnxruntime.InferenceSession(source, options, providers=[PROVIDERS[provider]])
