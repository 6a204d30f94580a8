"""A language model read in every way that a server may, by ONNX Runtime on slots, beside whole texts in PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from models.decoder_parts import LanguageNetwork

# Texts that are in slots together; tokens that are compared, at most, and of a large network only as many as so many
# products of its parameters allow, but some at least; numbers of all logits that are compared at once.
TEXTS = 5
FEWEST_TOKENS, MOST_TOKENS = 64, 2048
MOST_PRODUCTS = 2**36
MOST_NUMBERS = 2**24
# Tokens of a text that come one by one, and in what pieces those before them come.
DECODED = 4
CHUNKS = (3, 1, 8, 64)


@dataclass(frozen=True)
class Answers:
    """Logits float32 [places, vocabulary] of both, of the same places. lengths: of the texts. rows: how many of them
    were in one run. words: how they were read."""

    expected: NDArray[np.float32]
    found: NDArray[np.float32]
    lengths: list[int]
    rows: set[int]
    words: str


class Slots:
    """Keys and values in the memory that the graph reads them from and writes them to."""

    def __init__(self, session: onnxruntime.InferenceSession, slots: int, size: int) -> None:
        self.session = session
        past = [value for value in session.get_inputs() if value.name.startswith("past_")]
        self.dtype = np.float16 if past[0].type == "tensor(float16)" else np.float32
        self.caches = {
            value.name: np.zeros((slots, value.shape[1], size, value.shape[3]), self.dtype) for value in past
        }

    def run(self, first: int, token: np.ndarray, length: np.ndarray, asked: np.ndarray) -> NDArray[np.float32]:
        """The slots from `first` on take the next tokens, int64 [rows, tokens]; logits of those that are asked."""
        given = {"token": token, "length": length.astype(np.int32), "longest": np.int32(length.max()), "asked": asked}
        binding = self.session.io_binding()
        for name, value in given.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, cache in self.caches.items():
            rows = cache[first : first + len(token)]
            place = ("cpu", 0, self.dtype, rows.shape, rows.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(f"next_{name}", *place)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        return logits

    def move(self, source: int, target: int) -> None:
        for cache in self.caches.values():
            cache[target] = cache[source]


def answers(network: LanguageNetwork, path: Path, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Answers]:
    """Texts are read one after the other in pieces, and again all at once; each time their last tokens come one by one,
    in all slots together, and the last text moves to the slot of one that is done.

    batches: `input_ids` and `attention_mask` of whole texts, of which the first are read. Raises what ONNX Runtime
    raises for a graph that does not run.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    size = sum(parameter.numel() for parameter in network.parameters())
    reading = _texts(batches, network.context, min(max(FEWEST_TOKENS, MOST_PRODUCTS // size), MOST_TOKENS))
    while texts := list(islice(reading, TEXTS)):
        lengths = np.array([len(text) for text in texts])
        ids = np.zeros((len(texts), lengths.max()), np.int64)
        asked = np.zeros(ids.shape, bool)
        every = 1 + int(lengths.sum()) * session.get_outputs()[0].shape[1] // MOST_NUMBERS
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            asked[row, len(text) - 1 :: -every] = True
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        with torch.no_grad():
            whole = network(*(torch.from_numpy(array) for array in (ids, mask.astype(np.int64), asked)))
        expected = whole["logits"].numpy()
        for together in (False, True):
            # Slots that are longer than any text, and more of them than texts.
            slots = Slots(session, len(texts) + together, ids.shape[1] + 3 * together)
            found = np.full_like(expected, np.nan)
            rows = _read(slots, ids, lengths, asked, found, together)
            yield Answers(expected, found, lengths.tolist(), rows, "all at once" if together else "in pieces")


def _texts(batches: Iterable[Mapping[str, np.ndarray]], context: int, most: int) -> Iterator[NDArray[np.int64]]:
    """One by one, of `most` tokens in all."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            text = ids[mask > 0][: min(context, most)]
            most -= len(text)
            if len(text):
                yield text
            if most <= 0:
                return


def _read(
    slots: Slots, ids: np.ndarray, lengths: np.ndarray, asked: np.ndarray, found: np.ndarray, together: bool
) -> set[int]:
    """Fills in `found`, the logits of the places that are `asked`; how many texts were in one run."""
    number = np.where(asked, asked.cumsum().reshape(asked.shape) - 1, -1)
    rows = set()

    def run(first: int, token: np.ndarray, length: np.ndarray, wanted: np.ndarray) -> None:
        """wanted: the place in `found` of each token's logits, or -1."""
        rows.add(len(token))
        (places,) = np.nonzero(wanted.ravel() >= 0)
        found[wanted.ravel()[places]] = slots.run(first, token, length, places)

    read = np.maximum(lengths - DECODED, 1)
    if together:
        before = np.arange(read.max()) < read[:, None]
        run(0, np.where(before, ids[:, : read.max()], 0), read, np.where(before, number[:, : read.max()], -1))
    else:
        for row, end in enumerate(read.tolist()):
            start = 0
            for size in cycle(CHUNKS):
                stop = min(start + size, end)
                run(row, ids[[row], start:stop], np.array([stop]), number[[row], start:stop])
                start = stop
                if start == end:
                    break
    going = np.arange(len(ids))
    while True:
        for slot in reversed(range(len(going))):
            if read[going[slot]] == lengths[going[slot]]:
                slots.move(len(going) - 1, slot)
                going[slot] = going[-1]
                going = going[:-1]
        if not len(going):
            return rows
        now = read[going]
        run(0, ids[going, now][:, None], now + 1, number[going, now][:, None])
        read[going] += 1
