"""A GPU: our session beside ONNX Runtime as it comes and PyTorch, in one run: python -m benchmarks.cuda [--output FILE]

EfficientNet-Lite0 at 224 pixels and MiniLM at 128 tokens, batches of 1 to 256, samples a second from arrays in the
server's memory to answers there. Weights are random: they do not change the speed.

- ONNX Runtime: `InferenceSession.run` on the CUDA provider with its default options, one thread.
- no copies: the same session, with inputs and outputs that stay on the GPU: what computing alone takes.
- ours: `server.runtime.session.Session`, by as many threads as it takes; captured: with CUDA graphs; half: the graph in
  float16.
- PyTorch: the network that was exported, eager, with TF32 matrices as ONNX Runtime has them, from page-locked memory;
  and in float16.

Copies: between host and device, for one batch, from ONNX Runtime's own profile and our count.
"""

from __future__ import annotations

import argparse
import json
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
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from export import half_precision
from models.network import Network
from models.spec import Classification, ModelSpec

BATCHES = (1, 4, 16, 64, 256)
SECONDS = 0.6
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


def build(name: str, folder: Path) -> tuple[Network, Path]:
    """The network, and its graph as a job would publish it."""
    from export.onnx import export_onnx
    from models import registry

    network = registry.build(SPECS[name]).eval()
    folder.mkdir()
    export_onnx(network, folder, sample(name, 4))
    return network, folder / "model.onnx"


def rate(run: Callable[[], Any], rows: int, threads: int = 1) -> float:
    """Samples a second of `threads` that call `run` over and over, after a warm-up: the median of some rounds."""
    for _ in range(4):
        run()

    def work(stop: threading.Event, counts: list[int], place: int) -> None:
        while not stop.is_set():
            run()
            counts[place] += 1

    found = []
    for _ in range(ROUNDS):
        counts, stop = [0] * threads, threading.Event()
        workers = [threading.Thread(target=work, args=(stop, counts, i)) for i in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        time.sleep(SECONDS / ROUNDS)
        stop.set()
        for worker in workers:
            worker.join()
        found.append(sum(counts) * rows / (time.perf_counter() - start))
    return median(found)


def resident(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> Callable[[], Any]:
    """A run whose inputs and outputs stay on the GPU."""
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for name, value in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("logits", "cuda", 0)
    return lambda: session.run_with_iobinding(binding)


def torch_run(network: Network, inputs: dict[str, np.ndarray]) -> Callable[[], Any]:
    """From page-locked host memory to an answer on the host."""
    device = torch.device("cuda")
    held = {name: torch.from_numpy(value).pin_memory() for name, value in inputs.items()}

    def run() -> Any:
        with torch.inference_mode():
            moved = [value.to(device, non_blocking=True) for value in held.values()]
            return network(*moved)["logits"].float().cpu()

    return run


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


def measure(name: str, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    from server.runtime.placement import Placement
    from server.runtime.session import Session

    network, path = build(name, folder)
    say(f"{name}: exported")
    even = name != "MiniLM"
    plain = onnxruntime.InferenceSession(str(path), providers=[CUDA, "CPUExecutionProvider"])
    assert plain.get_providers()[0] == CUDA, "CUDA does not initialise here"
    sessions = {"ours": Session(path, Placement(even=even, tuned=even))}
    half = path.with_name("model.float16.onnx")
    half_precision.half(path, half, "float16")
    sessions["half"] = Session(half, Placement(even=even, tuned=even))
    if even:
        sessions["captured"] = Session(path, Placement(even=even, tuned=even, captured=True))
    for words, session in sessions.items():
        start = time.perf_counter()
        session.warm_up(partial(sample, name), ["logits"], BATCHES[-1])
        say(f"{name}, {words}: warmed up in {time.perf_counter() - start:.1f} s")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    full = network.to("cuda")
    truth = plain.run(["logits"], sample(name, 3))[0]
    figures = []
    for rows in BATCHES:
        inputs = sample(name, rows)
        one: dict[str, Any] = {"model": name, "batch": rows}
        one["onnxruntime"] = rate(partial(plain.run, ["logits"], inputs), rows)
        one["no_copies"] = rate(resident(plain, inputs), rows)
        for words, session in sessions.items():
            one[words] = rate(partial(session.run, inputs, ["logits"]), rows, session.parallel)
            got = session.run(sample(name, 3), ["logits"])[0]
            one[f"{words}_difference"] = float(np.abs(got - truth).max())
        one["torch"] = rate(torch_run(full, inputs), rows)
        figures.append(one)
        say(str(one))
    halved = network.to("cuda", torch.float16)
    for one in figures:
        one["torch_half"] = rate(torch_run(halved, sample(name, one["batch"])), one["batch"])
    lane = sessions["ours"].lanes.get()
    before = lane.copies
    lane.run({key: [value] for key, value in sample(name, 4).items()}, ["logits"])
    inside = profiled_copies(path, sample(name, 4))
    say(f"{name}: copies of one batch: ours {lane.copies - before}, and {inside} inside the graph")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    output = parser.parse_args().output
    console = Console(width=140)
    console.print(torch.cuda.get_device_name(), f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for name in SPECS:
            figures += measure(name, Path(folder) / name, lambda words: console.print(words, highlight=False))
    console.print(table(figures))
    if output is not None:
        output.write_text(json.dumps({"card": torch.cuda.get_device_name(), "figures": figures}, indent=1))


def table(figures: list[dict[str, Any]]) -> Table:
    columns = ("onnxruntime", "no_copies", "ours", "captured", "half", "torch", "torch_half")
    made = Table("model", "batch", *columns, "ours / onnxruntime", "ours / torch", box=box.SIMPLE)
    for one in figures:
        best = max(one["ours"], one.get("captured", 0.0))
        made.add_row(
            one["model"],
            str(one["batch"]),
            *(f"{one[name]:,.0f}" if name in one else "" for name in columns),
            f"{best / one['onnxruntime']:.2f}",
            f"{best / one['torch']:.2f}",
        )
    return made


if __name__ == "__main__":
    main()
