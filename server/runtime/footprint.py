"""How much memory a model takes, before it is loaded.

Resident growth cannot be read off a process that does other things meanwhile, so it was measured once, in processes of
their own (ONNX Runtime 1.31 on a CPU, graphs of 94 and 101 MB): 24 MatMul layers took 1.1 times the size of their
files with the weights beside the graph and 1.3 times with the weights in it; 10 convolutions 2.3 and 3.2 times, because
their weights are kept once more in the order that the kernels read. The larger of each is taken. The keys and values of
a language model are not counted: `generation_tokens` bounds them.
"""

from __future__ import annotations

from pathlib import Path

from export.bundle import Manifest
from export.processing.inputs import ImageInput, LatentInput, SeriesInput

WITH_CONVOLUTIONS, WITHOUT = 3.2, 1.35


def footprint(manifest: Manifest) -> int:
    """Bytes, from the sizes of the graphs and of their weights."""
    weights = sum(digest.bytes for name, digest in manifest.files.items() if _is_loaded(name))
    convolutions = isinstance(manifest.input, ImageInput | LatentInput | SeriesInput)
    return round(weights * (WITH_CONVOLUTIONS if convolutions else WITHOUT))


def _is_loaded(name: str) -> bool:
    return Path(name).name.endswith((".onnx", ".onnx.data"))
