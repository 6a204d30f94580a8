"""Where a graph runs, and how: what the bundle, its deployment and the server's settings say together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.bundle import DamagedBundle, Manifest, Provider
from export.processing.inputs import ImageInput, LatentInput, SeriesInput, TextInput
from server.runtime.deployment import Deployment
from server.settings import Settings


@dataclass(frozen=True)
class Placement:
    """providers: that are wanted, in order; none: CUDA where it is, then the CPU. parallel: runs at the same time, of a
    GPU for each device; 0: by itself. threads: of one run on the CPU; 0: by the cores. devices: numbers of GPUs; none:
    the first. alone: on a CPU a run beside which there is none may have all cores, by one session more. captured:
    batches of one size are captured as a CUDA graph. tensorrt: before CUDA; engines: the folder that keeps what it has
    built. even: inputs differ in the number of rows only (images, vectors). tuned: a kernel is
    chosen anew for every size of batch (convolutions). most: rows of the largest batch."""

    providers: tuple[str, ...] = ()
    parallel: int = 0
    threads: int = 0
    devices: tuple[int, ...] = ()
    alone: bool = False
    captured: bool = False
    tensorrt: bool = False
    engines: Path | None = None
    even: bool = False
    tuned: bool = False
    most: int = 64


def graph_of(manifest: Manifest, precision: str, provider: Provider) -> str:
    """The file that `provider` is given: what the bundle says is the fastest ("auto"), or the one of a precision.

    Raises DamagedBundle where the bundle has no graph of that precision.
    """
    chosen = manifest.serving.get(provider, "float32") if precision == "auto" else precision
    if chosen == "float32":
        return "model.onnx"
    there = [one.precision for one in manifest.variants]
    if chosen not in there:
        raise DamagedBundle(
            f"{manifest.name} version {manifest.version}: precision {chosen} is asked for; the bundle has "
            f"{', '.join(['float32', *there])}"
        )
    return f"model.{chosen}.onnx"


def placement(settings: Settings, deployment: Deployment, manifest: Manifest) -> Placement:
    """Of model.onnx, and of every other graph of the bundle."""
    return Placement(
        providers=tuple(settings.providers),
        parallel=deployment.instances or settings.parallel_runs,
        threads=deployment.intra_op_threads or settings.intra_op_threads,
        devices=tuple(deployment.devices),
        # Another session is the weights in memory once more: not where threads or memory are counted out.
        alone=not (deployment.intra_op_threads or settings.intra_op_threads or settings.model_memory_bytes),
        captured=deployment.cuda_graphs,
        tensorrt=deployment.tensorrt,
        engines=settings.home / "tensorrt" / manifest.name / str(manifest.version),
        even=not isinstance(manifest.input, TextInput | SeriesInput),
        tuned=isinstance(manifest.input, ImageInput | LatentInput),
        most=deployment.max_batch_size or manifest.batching.max_batch_size,
    )
