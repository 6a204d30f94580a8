"""A decoder that keeps the keys and values of many sequences in slots, and computes some of them at a time.

A row has `context` places, a place is a token. What the rows are used for, and how many of their places hold something,
is known to the caller alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime

from server.process import cores, memory_bytes
from server.runtime.huge_pages import huge_pages
from server.runtime.session import CPU, CUDA, threads_of, usable
from server.runtime.slot_memory import DeviceMemory, HostMemory, SlotMemory
from server.settings import Settings

log = logging.getLogger("espalier.slots")

# Without another word no sequence has more places, however many the network could tell apart.
MOST_CONTEXT = 4096
# All rows together take this share of the machine's memory at most.
MEMORY_SHARE = 0.25
# Rows for every slot, where memory is only taken by what is in them.
KEPT = 2
TYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}


class SlotModel(Protocol):
    """What an engine asks of a network. Logits are the model's own memory: good until the next call, may be changed.

    slots: sequences that may be computed together, in the first of the rows. rows: of memory, more than slots: the
    others keep what may be needed again. context: places of a row. tokens: places that may be taken in all together.
    """

    slots: int
    rows: int
    context: int
    vocabulary: int
    tokens: int

    def prefill(self, row: int, tokens: Sequence[int] | np.ndarray, start: int, *, logits: bool) -> np.ndarray | None:
        """Compute `tokens` at places start, start + 1, … of a row that holds `start` places. Logits of what follows the
        last: float32 [vocabulary], where they are asked for."""

    def score(self, row: int, tokens: Sequence[int] | np.ndarray, start: int) -> np.ndarray:
        """As `prefill`; logits of what follows each of the tokens, float32 [tokens, vocabulary], the caller's own."""

    def prefill_together(self, first: int, prompts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Compute whole prompts in rows first, first + 1, …, which hold nothing: float32 [prompts, vocabulary]."""

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Compute one token in each of rows 0 … n-1, at place `lengths` - 1. tokens: int64 [n]; lengths: int32 [n];
        logits float32 [n, vocabulary]."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` places of row `target` those of row `source`."""

    def release(self, row: int, kept: int) -> None:
        """Places of a row from `kept` on are needed no longer: their memory may be given back."""


class GraphSlots:
    """The slot graph of a language model in an ONNX Runtime session. For one thread."""

    def __init__(self, path: Path, settings: Settings, *, context: int) -> None:
        """context: most places that the network can tell apart.

        Raises ValueError for a graph that is no slot graph, and what ONNX Runtime raises for one that it cannot load.
        """
        options = threads_of(settings.intra_op_threads or cores(), spinning=True)
        asked = usable(settings.providers)
        with huge_pages():
            self.session = onnxruntime.InferenceSession(str(path), options, providers=asked)
        if asked != [CPU] and any(tensor.type == "tensor(float)" for tensor in self.session.get_inputs()):
            # The attention over float32 slots is the CPU's alone: anywhere else they would be copied at every step.
            log.info("%s keeps float32 slots and runs on the CPU", path)
            with huge_pages():
                self.session = onnxruntime.InferenceSession(str(path), options, providers=[CPU])
        self.provider: str = self.session.get_providers()[0]
        inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        outputs = {tensor.name: tensor for tensor in self.session.get_outputs()}
        needed = ("token", "length", "longest", "asked")
        self.past = [name for name in inputs if name not in needed]
        if lost := [name for name in needed if name not in inputs]:
            raise ValueError(f"the slot graph has no input {lost[0]}")
        if lost := [name for name in ("logits", *(f"next_{name}" for name in self.past)) if name not in outputs]:
            raise ValueError(f"the slot graph has no output {lost[0]}")
        if not self.past:
            raise ValueError("the slot graph keeps no keys and values")
        self.dtype: np.dtype[Any] = TYPES[inputs[self.past[0]].type]
        heads = [(inputs[name].shape[1], inputs[name].shape[3]) for name in self.past]
        vocabulary = outputs["logits"].shape[1]
        if not all(isinstance(size, int) for size in (vocabulary, *(size for pair in heads for size in pair))):
            raise ValueError("the slot graph does not say how many heads, depths and tokens there are")
        self.vocabulary = int(vocabulary)
        self.logits_dtype: np.dtype[Any] = TYPES[outputs["logits"].type]
        self.slots = settings.generation_slots
        self.context = min(context, settings.generation_context or MOST_CONTEXT)
        place = sum(count * depth for count, depth in heads) * self.dtype.itemsize
        fit = settings.generation_tokens or int(MEMORY_SHARE * memory_bytes()) // place
        shapes = [(count, self.context, depth) for count, depth in heads]
        self.memory: SlotMemory
        if self.provider == CUDA:
            if settings.generation_tokens:
                self.slots = max(1, min(self.slots, fit // self.context - 1))
            self.rows = self.slots + 1
            self.memory = DeviceMemory(self.rows, shapes, self.dtype, self.provider, "cuda")
            fit = self.rows * self.context
        else:
            self.rows = KEPT * self.slots
            self.memory = HostMemory(self.rows, shapes, self.dtype)
        self.tokens = min(fit, self.rows * self.context)
        self.row_bytes = [count * self.context * depth * self.dtype.itemsize for count, depth in heads]
        self.shapes = shapes
        self.copy, self.release = self.memory.copy, self.memory.release
        # Where runs read and write, and the bindings to it: what a step takes changes, and where it is does not.
        self.token = np.zeros(self.slots, np.int64)
        self.length = np.zeros(self.slots, np.int32)
        self.longest = np.zeros((), np.int32)
        self.asked = np.arange(self.slots)
        self.logits = np.zeros((self.slots, self.vocabulary), self.logits_dtype)
        self.steps: dict[int, onnxruntime.IOBinding] = {}
        self.bindings: dict[tuple[int, int], onnxruntime.IOBinding] = {}

    def prefill(self, row: int, tokens: Sequence[int] | np.ndarray, start: int, *, logits: bool) -> np.ndarray | None:
        piece = np.asarray(tokens, np.int64)[None]
        asked = np.array([len(tokens) - 1] if logits else [], np.int64)
        found = self._read(row, piece, np.array([start + len(tokens)], np.int32), asked)
        return found[0] if logits else None

    def score(self, row: int, tokens: Sequence[int] | np.ndarray, start: int) -> np.ndarray:
        piece, length = np.asarray(tokens, np.int64)[None], np.array([start + len(tokens)], np.int32)
        logits = np.empty((len(tokens), self.vocabulary), self.logits_dtype)
        self.longest[...] = length[0]
        self.session.run_with_iobinding(self._bind(self._rows(row, 1), piece, length, np.arange(len(tokens)), logits))
        return logits.astype(np.float32, copy=False)

    def prefill_together(self, first: int, prompts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        length = np.array([len(prompt) for prompt in prompts], np.int32)
        rows = np.zeros((len(prompts), int(length.max())), np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            row[: len(prompt)] = prompt
        return self._read(first, rows, length, np.arange(len(rows)) * rows.shape[1] + length - 1)

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        n = len(tokens)
        self.token[:n], self.length[:n], self.longest[...] = tokens, lengths, lengths.max()
        if n not in self.steps:
            inputs = self.token[:n, None], self.length[:n], self.asked[:n]
            self.steps[n] = self._bind(self._bound(0, n), *inputs, self.logits)
        self.session.run_with_iobinding(self.steps[n])
        return self._answered(n)

    def _answered(self, rows: int) -> np.ndarray:
        found: np.ndarray = self.logits[:rows].astype(np.float32, copy=False)
        return found

    def _read(self, first: int, tokens: np.ndarray, length: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Logits [asked, vocabulary] of tokens [rows, tokens] in rows first, first + 1, …"""
        self.longest[...] = length.max()
        binding = self._rows(first, len(tokens))
        self.session.run_with_iobinding(self._bind(binding, tokens, length, asked, self.logits))
        return self._answered(len(asked))

    def _rows(self, first: int, rows: int) -> onnxruntime.IOBinding:
        if (first, rows) not in self.bindings:
            self.bindings[first, rows] = self._bound(first, rows)
        return self.bindings[first, rows]

    def _bind(
        self,
        binding: onnxruntime.IOBinding,
        token: np.ndarray,
        length: np.ndarray,
        asked: np.ndarray,
        logits: np.ndarray,
    ) -> onnxruntime.IOBinding:
        for name, value in {"token": token, "length": length, "longest": self.longest, "asked": asked}.items():
            binding.bind_cpu_input(name, value)
        shape = (len(asked), self.vocabulary)
        binding.bind_output("logits", "cpu", 0, self.logits_dtype, shape, logits.ctypes.data)
        return binding

    def _bound(self, first: int, rows: int) -> onnxruntime.IOBinding:
        """A binding whose past and present are rows first, first + 1, … in place."""
        binding = self.session.io_binding()
        for name, pointer, row, shape in zip(self.past, self.memory.pointers, self.row_bytes, self.shapes, strict=True):
            where = (self.memory.device, 0, self.dtype, (rows, *shape), pointer + first * row)
            binding.bind_input(name, *where)
            binding.bind_output(f"next_{name}", *where)
        return binding
