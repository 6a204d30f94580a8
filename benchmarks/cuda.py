"""A GPU: our session beside ONNX Runtime as it comes and PyTorch, in one run: python -m benchmarks.cuda [--output FILE]

EfficientNet-Lite0 at 224 pixels and MiniLM at 128 tokens, batches of 1 to 256, samples a second from arrays in the
server's memory to answers there. Weights are random: they do not change the speed.

- onnxruntime: `InferenceSession.run` on the CUDA provider with its default options, one thread.
- no_copies: the same session, with inputs and outputs that stay on the GPU: what computing alone takes.
- ours: `server.runtime.session.Session`, by as many threads as it takes; captured: with CUDA graphs; half: in float16.
- torch: the network that was exported, eager, with TF32 matrices as ONNX Runtime has them, from page-locked memory; and
  in float16.
- mixed: batches of all these sizes in turn, samples a second over all.

Each in a process of its own. Copies: between host and device for one batch, by our count, and in ONNX Runtime's profile
of the graph.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from rich import box
from rich.console import Console
from rich.table import Table

from export import half_precision
from models.spec import Classification, ModelSpec
from server.runtime.placement import Placement
from server.runtime.session import Session, usable
from server.runtime.sized_lanes import SizedLanes

BATCHES = (1, 4, 16, 64, 256)
KINDS = ("onnxruntime", "no_copies", "ours", "captured", "torch", "half", "torch_half")
SECONDS = 0.45
ROUNDS = 3
CUDA = "CUDAExecutionProvider"
MINILM = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
SPECS = {
    "EfficientNet-Lite0": ModelSpec(
        architecture="efficientnet_lite0", hyperparameters={"image_size": 224}, task=Classification(1000)
    ),
    "MiniLM": ModelSpec(
        architecture="text_encoder", hyperparameters={"config": MINILM, "max_length": 128}, task=Classification(10)
    ),
}


def sample(name: str, rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    if name == "MiniLM":
        ids = random.integers(1000, 30000, (rows, 128))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return {"pixels": random.integers(0, 256, (rows, 224, 224, 3), dtype=np.uint8)}


def build(name: str, folder: Path) -> None:
    """The graph as a job would publish it."""
    from export.onnx import export_onnx
    from models import registry

    folder.mkdir()
    export_onnx(registry.build(SPECS[name]).eval(), folder, sample(name, 4))


def rate(run: Callable[[], Any], rows: int, threads: int = 1) -> float:
    """Samples a second of `threads` that call `run` over and over, after a warm-up: the median of some rounds."""

    def work(stop: threading.Event, counts: list[int], place: int) -> None:
        while not stop.is_set():
            run()
            counts[place] += 1

    for _ in range(4):
        run()
    found = []
    for _ in range(ROUNDS):
        counts, stop = [0] * threads, threading.Event()
        timer = threading.Timer(SECONDS / ROUNDS, stop.set)
        others = [threading.Thread(target=work, args=(stop, counts, i)) for i in range(1, threads)]
        start = time.perf_counter()
        for thread in (*others, timer):
            thread.start()
        work(stop, counts, 0)
        for thread in others:
            thread.join()
        found.append(sum(counts) * rows / (time.perf_counter() - start))
    return median(found)


def mixed(run: Callable[[dict[str, np.ndarray]], Any], name: str) -> float:
    """Samples a second where every batch has another size than the one before."""
    batches = [sample(name, rows) for rows in (*BATCHES[:-1], *reversed(BATCHES[:-1]))]
    for inputs in batches:
        run(inputs)
    start, samples = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        for inputs in batches:
            run(inputs)
            samples += len(next(iter(inputs.values())))
    return samples / (time.perf_counter() - start)


def resident(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> Callable[[], Any]:
    """A run whose inputs and outputs stay on the GPU."""
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for name, value in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("logits", "cuda", 0)
    return lambda: session.run_with_iobinding(binding)


def torch_runs(name: str, *, half: bool) -> dict[str, Any]:
    import torch

    from models import registry

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device("cuda")
    network = registry.build(SPECS[name]).eval().to(device, torch.float16 if half else torch.float32)

    def answered(held: dict[str, torch.Tensor]) -> Any:
        with torch.inference_mode():
            moved = [value.to(device, non_blocking=True) for value in held.values()]
            return network(*moved)["logits"].float().cpu()

    found = {}
    for rows in BATCHES:
        pinned = {key: torch.from_numpy(value).pin_memory() for key, value in sample(name, rows).items()}
        found[str(rows)] = rate(partial(answered, pinned), rows)
    found["mixed"] = mixed(
        lambda inputs: answered({key: torch.from_numpy(value) for key, value in inputs.items()}), name
    )
    return found


def profiled_copies(path: Path, inputs: dict[str, np.ndarray]) -> int:
    """Copies of ONNX Runtime's own graph for one batch: nodes that move a tensor between host and device."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "run")
        session = onnxruntime.InferenceSession(str(path), options, providers=[CUDA, "CPUExecutionProvider"])
        session.run(["logits"], inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    return sum("Memcpy" in event.get("args", {}).get("op_name", "") for event in events)


def measure(kind: str, name: str, folder: Path) -> dict[str, Any]:
    """One column of the table, by batch size, and what else it has to say."""
    path = folder / "model.onnx"
    even = name != "MiniLM"
    if kind in ("torch", "torch_half"):
        return torch_runs(name, half=kind == "torch_half")
    usable([])  # has CUDA's libraries found where they are Python packages
    if kind in ("onnxruntime", "no_copies"):
        plain = onnxruntime.InferenceSession(str(path), providers=[CUDA, "CPUExecutionProvider"])
        assert plain.get_providers()[0] == CUDA, "CUDA does not initialise here"
        if kind == "no_copies":
            return {str(rows): rate(resident(plain, sample(name, rows)), rows) for rows in BATCHES}
        found: dict[str, Any] = {
            str(rows): rate(partial(plain.run, ["logits"], sample(name, rows)), rows) for rows in BATCHES
        }
        found["mixed"] = mixed(lambda inputs: plain.run(["logits"], inputs), name)
        found["answer"] = plain.run(["logits"], sample(name, 3))[0][:, :5].tolist()
        found["copies"] = profiled_copies(path, sample(name, 4))
        return found
    if kind == "half":
        path = path.with_name("model.float16.onnx")
        half_precision.half(folder / "model.onnx", path, "float16")
    placed = Placement(even=even, tuned=even, captured=kind == "captured")
    start = time.perf_counter()
    session = Session(path, placed)
    session.warm_up(partial(sample, name), ["logits"])
    found = {
        "warm_up_seconds": time.perf_counter() - start,
        "answer": session.run(sample(name, 3), ["logits"])[0][:, :5].tolist(),
    }
    for rows in BATCHES:
        found[str(rows)] = rate(partial(session.run, sample(name, rows), ["logits"]), rows, session.parallel)
    found["mixed"] = mixed(lambda inputs: session.run(inputs, ["logits"]), name)
    lanes = session.lanes.get()
    lane = lanes.lanes[4] if isinstance(lanes, SizedLanes) else lanes
    before = lane.copies
    lanes.run({key: [value] for key, value in sample(name, 4).items()}, ["logits"])
    found["copies"] = lane.copies - before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "MODEL", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], given.one[1], Path(given.one[2]))))
        return
    console = Console(width=140)
    card = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout
    versions = {package: importlib.metadata.version(package) for package in ("torch", "numpy")}
    console.print(card.strip(), f"onnxruntime {onnxruntime.__version__}", versions)
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in SPECS:
            folder = Path(temporary) / name
            build(name, folder)
            figures[name] = {}
            for kind in KINDS:
                if kind == "captured" and name == "MiniLM":
                    continue
                command = [sys.executable, "-m", "benchmarks.cuda", "--one", kind, name, str(folder)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    console.print(f"{name}, {kind} failed: {done.stderr.strip().splitlines()[-1:]}")
                    continue
                figures[name][kind] = json.loads(done.stdout.splitlines()[-1])
                console.print(name, kind, {key: value for key, value in figures[name][kind].items() if key != "answer"})
            console.print(table(name, figures[name]))
            if given.output is not None:
                given.output.write_text(json.dumps({"card": card.strip(), "figures": figures}, indent=1))


def table(name: str, figures: dict[str, dict[str, Any]]) -> Table:
    made = Table("batch", *figures, "ours / onnxruntime", "ours / torch", title=name, box=box.SIMPLE)
    for row in (*map(str, BATCHES), "mixed"):
        cells = [f"{found[row]:,.0f}" if row in found else "" for found in figures.values()]
        best = max(figures[kind][row] for kind in ("ours", "captured", "half") if row in figures.get(kind, {}))
        ratios = [
            f"{best / figures[kind][row]:.2f}" if row in figures.get(kind, {}) else ""
            for kind in ("onnxruntime", "torch")
        ]
        made.add_row(row, *cells, *ratios)
    return made


if __name__ == "__main__":
    main()
