"""Other people's engines, each in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from benchmarks import environments

PACKAGES = {
    "onnxruntime-genai": ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"),
    "llama-cpp-python": ("llama-cpp-python[server]==0.3.36",),
}


def environment(name: str, folder: Path) -> Path:
    """The Python of the peer's environment in `folder`. Raises NotInstalled."""
    return environments.environment(folder / name, PACKAGES[name])
