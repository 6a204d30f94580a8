"""The ceiling: our graph in a loop without scheduler, sampler and HTTP: python -m … FOLDER THREADS END

Every prompt is read whole, one after the other; then all sequences step together, greedily, the token of
the end left out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.generation.loops.turn import Batch, serve
from server.runtime.huge_pages import huge_pages

MOST_ROWS = 32
PLACES = 512


class Loop:
    """The session and its caches, float32 [rows, kv_heads, places, head_dim], which it updates in place."""

    def __init__(self, path: Path, threads: int, end: int) -> None:
        self.end = end
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        with huge_pages():  # as the server has them
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        known = {"token", "length", "longest", "asked"}
        caches = [one for one in self.session.get_inputs() if one.name not in known]
        self.caches = {
            one.name: np.zeros((MOST_ROWS, one.shape[1], PLACES, one.shape[3]), np.float32) for one in caches
        }
        self.logits = np.zeros((MOST_ROWS, self.session.get_outputs()[0].shape[1]), np.float32)
        self.bound: tuple[int, int] | None = None

    def run(self, first: int, token: np.ndarray, length: np.ndarray) -> list[int]:
        """The likeliest next tokens. token: int64 [rows, tokens] of the rows from `first` on; length: int32 [rows]."""
        rows, tokens = token.shape
        if self.bound != (first, rows):
            self.binding = self.session.io_binding()
            answered = (rows, self.logits.shape[1])
            self.binding.bind_output("logits", "cpu", 0, np.float32, answered, self.logits.ctypes.data)
            for name, cache in self.caches.items():
                place, shape = cache[first:].ctypes.data, (rows, *cache.shape[1:])
                self.binding.bind_input(name, "cpu", 0, np.float32, shape, place)
                self.binding.bind_output(f"next_{name}", "cpu", 0, np.float32, shape, place)
            self.bound = first, rows
        self.binding.bind_cpu_input("token", token)
        self.binding.bind_cpu_input("length", length)
        self.binding.bind_cpu_input("longest", np.array(length.max(), np.int32))
        self.binding.bind_cpu_input("asked", np.arange(rows, dtype=np.int64) * tokens + tokens - 1)
        self.session.run_with_iobinding(self.binding)
        logits = self.logits[:rows]
        logits[:, self.end] = -np.inf
        found: list[int] = logits.argmax(axis=-1).tolist()
        return found

    def generate(self, prompts: list[list[int]], tokens: int) -> Batch:
        batch, last = Batch(), []
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        for row, prompt in enumerate(prompts):
            last += self.run(row, np.array([prompt], np.int64), lengths[row : row + 1])
            batch.first.append(time.perf_counter())
        batch.last, batch.tokens = list(batch.first), [[token] for token in last]
        for _ in range(tokens - 1):
            lengths = lengths + np.int32(1)
            last = self.run(0, np.array(last, np.int64)[:, None], lengths)
            batch.step(last)
        return batch


if __name__ == "__main__":
    folder, threads, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    loop = Loop(folder / "model.onnx", threads, end)
    serve(f"{threads} threads; prompts one by one, then steps of all", loop.generate)
