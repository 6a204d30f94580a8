"""Items of a data set as graph inputs, prepared once and kept.

Everything goes through `export.processing`, which is what the server answers through: training cannot see another
tensor than serving does. Images are decoded once, by several threads, into one uint8 array; texts become rows of token
ids, series arrays of steps; vectors one float32 array.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from export.processing.images import decode_image
from export.processing.inputs import BadInput, DataInput, ImageInput, SeriesInput, TextInput, VectorInput
from export.processing.series import pad_series, series
from export.processing.text import TextProcessor, pad
from export.processing.vectors import vector
from finetune.chat_tokens import UNCUT, ChatTokens
from finetune.data.datasets import MOST_BROKEN, Dataset
from finetune.vocabulary import PAD, UNASKED

# Above this, decoded images live in a file that is mapped into memory: the page cache keeps what fits.
IN_MEMORY_BYTES = 2**30
CHUNK = 256
# Conversations that cannot be learned and are named one by one.
MOST_REMARKS = 20
CUT = "what is beyond is cut off"

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Written:
    """Texts that a network learns to write, and the tokenizer.json of their tokens."""

    spec: TextInput
    tokenizer: bytes


@dataclass(frozen=True)
class Items:
    """Some items of a data set, ready for the graph.

    targets: [items, ...] as `finetune.data.targets` has them; of texts, one int [tokens] an item, as objects: those
        that are to be written, or of texts without labels their own.
    lengths: int64 [items], tokens of texts and steps of series; None for the others.
    collate: rows of the data set → graph inputs by name; rows: int64 [items], those of these items.
    owners: int64 [items], the item of the data set that each is a part of; None where each is a whole one.
    padding: what stands behind the targets of a shorter text. remarks: what a person should know of how the items were
        prepared: what was cut, what was left out.
    """

    targets: np.ndarray
    lengths: np.ndarray | None
    rows: np.ndarray
    collate: Callable[[np.ndarray], Inputs]
    owners: np.ndarray | None = None
    padding: int = PAD
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: np.ndarray) -> Inputs:
        """Graph inputs of the items at `positions` int64 [batch], padded to the longest of them."""
        return self.collate(self.rows[positions])

    def batch_targets(self, positions: np.ndarray) -> np.ndarray:
        """Targets of the items at `positions`, [batch, ...]; of texts int64 [batch, tokens], padded behind the end."""
        found = self.targets[positions]
        return pad(found, self.padding, max_length=0, multiple=1)[0] if found.dtype == object else found

    def select(self, positions: np.ndarray) -> Items:
        """The items at `positions`, or all parts of these items of the data set; nothing is prepared again."""
        if self.owners is not None:
            positions = np.flatnonzero(np.isin(self.owners, positions))
        lengths = None if self.lengths is None else self.lengths[positions]
        owners = None if self.owners is None else self.owners[positions]
        return replace(self, targets=self.targets[positions], lengths=lengths, rows=self.rows[positions], owners=owners)


def prepare(
    dataset: Dataset,
    spec: DataInput,
    tokenizer: bytes | None,
    folder: Path,
    progress: Callable[[int, int], None],
    written: Written | None = None,
    chat_template: str | None = None,
    end_token_ids: Sequence[int] = (),
) -> Items:
    """All items of `dataset` as `spec` says.

    tokenizer: tokenizer.json, for texts. folder: where a large image array may lie. progress: called with the items
    done and in all, every few hundred; what it raises ends the work. written: of targets that are texts.
    chat_template, end_token_ids: of conversations, and what ends an answer. Raises BadInput naming the item that is
    wrong; of conversations only when more than a tenth are, else they are left out.
    """
    if isinstance(spec, ImageInput):
        return _images(dataset, spec, folder, progress)
    if isinstance(spec, TextInput):
        assert tokenizer is not None, "texts need a tokenizer"
        if dataset.source.wanted.kind == "nothing":
            return _windows(dataset, spec, tokenizer, progress)
        if dataset.source.wanted.kind == "chat":
            return _chats(dataset, spec, ChatTokens(spec, tokenizer, chat_template, end_token_ids), progress)
        items = _texts(dataset, spec, tokenizer, progress)
        if written is None:
            return items
        targets, cut = written_tokens(dataset.targets, written)
        remark = remark_on_length(cut, len(targets), "translations", written.spec.max_length, CUT)
        return replace(items, targets=targets, remarks=items.remarks + remark)
    if isinstance(spec, SeriesInput):
        return _series(dataset, spec, progress)
    return _vectors(dataset, spec, progress)


def written_tokens(texts: np.ndarray, written: Written) -> tuple[np.ndarray, int]:
    """The tokens of each of `texts`, str [items] as objects: int64 [tokens] as objects, [BOS] … [EOS], cut at
    max_length; and how many were cut. What is cut does not end there, so that nobody learns to end in the middle of a
    sentence."""
    most = written.spec.max_length
    processor = TextProcessor(msgspec.structs.replace(written.spec, max_length=most + 1), written.tokenizer)
    found, cut = np.empty(len(texts), object), 0
    for start in range(0, len(texts), CHUNK):
        for row, ids in enumerate(processor.encode(list(texts[start : start + CHUNK])), start):
            found[row] = np.array(ids[:most], np.int64)
            cut += len(ids) > most
    return found, cut


def remark_on_length(longer: int, items: int, what: str, most: int, done: str) -> tuple[str, ...]:
    """Nothing when none is longer than `most` tokens. done: what was done to those that are."""
    return (f"{longer:,} of {items:,} {what} are longer than {most:,} tokens (max_length): {done}",) if longer else ()


def tensors(inputs: Inputs, device: torch.device) -> list[Tensor]:
    """The values of `inputs` on `device`, in their order, which is the order of the network's arguments."""
    return [torch.from_numpy(value).to(device) for value in inputs.values()]


def _images(dataset: Dataset, spec: ImageInput, folder: Path, progress: Callable[[int, int], None]) -> Items:
    shape = (len(dataset), spec.height, spec.width, spec.channels)
    pixels: np.ndarray
    if math.prod(shape) <= IN_MEMORY_BYTES:
        pixels = np.empty(shape, np.uint8)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.lib.format.open_memmap(folder / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)

    def decode(row: int) -> None:
        with _named(dataset, row):
            pixels[row] = decode_image(dataset.content(row), spec)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for rows in _chunks(len(dataset), progress):
            list(pool.map(decode, rows))
    return Items(dataset.targets, None, np.arange(len(dataset)), lambda rows: {"pixels": pixels[rows]})


def _texts(dataset: Dataset, spec: TextInput, tokenizer: bytes, progress: Callable[[int, int], None]) -> Items:
    processor = TextProcessor(spec, tokenizer)
    ids: list[list[int]] = []
    cut = 0
    for rows in _chunks(len(dataset), progress):
        for tokens, is_cut in processor.encode_marked([dataset.content(row) for row in rows]):
            ids.append(tokens)
            cut += is_cut

    def collate(rows: np.ndarray) -> Inputs:
        input_ids, attention_mask = pad([ids[row] for row in rows], spec.pad_token_id, max_length=spec.max_length)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    lengths = np.array([len(row) for row in ids], np.int64)
    remarks = remark_on_length(cut, len(ids), "texts", spec.max_length, CUT)
    return Items(dataset.targets, lengths, np.arange(len(dataset)), collate, remarks=remarks)


def _windows(dataset: Dataset, spec: TextInput, tokenizer: bytes, progress: Callable[[int, int], None]) -> Items:
    """Texts without labels, whose tokens are their targets. One that is longer than max_length is read in parts, each
    of which begins with the last token of the one before: every token but the first follows once on what it
    follows. The end of a text is learned, also where the tokenizer does not put it."""
    processor = TextProcessor(msgspec.structs.replace(spec, max_length=UNCUT), tokenizer)
    parts: list[np.ndarray] = []
    owners: list[int] = []
    longer = 0
    for rows in _chunks(len(dataset), progress):
        for row, ids in zip(rows, processor.encode([dataset.content(row) for row in rows]), strict=True):
            if spec.eos_token_id is not None and ids[-1] != spec.eos_token_id:
                ids.append(spec.eos_token_id)
            longer += len(ids) > spec.max_length
            for start in range(0, len(ids) - 1, spec.max_length - 1):
                parts.append(np.array(ids[start : start + spec.max_length], np.int32))
                owners.append(row)

    return _token_items(
        spec, parts, parts, owners, remark_on_length(longer, len(dataset), "texts", spec.max_length, "learned in parts")
    )


def _chats(dataset: Dataset, spec: TextInput, chats: ChatTokens, progress: Callable[[int, int], None]) -> Items:
    """Conversations and completions, whose targets are what is learned of their tokens. One that is longer than
    max_length is cut behind, or left out where nothing that is learned would be left."""
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    owners: list[int] = []
    cut = lost = 0
    wrong: list[str] = []
    for rows in _chunks(len(dataset), progress):
        for row in rows:
            try:
                found = chats.rows(dataset.content(row))
            except BadInput as error:
                wrong.append(f"{dataset.place(row)}: {error}")
                continue
            for one in found:
                learned = one.targets[: spec.max_length]
                if not (learned[1:] != UNASKED).any():
                    lost += 1
                    continue
                cut += len(one.tokens) > spec.max_length
                tokens.append(one.tokens[: spec.max_length])
                targets.append(learned)
                owners.append(row)
    if len(wrong) > MOST_BROKEN * len(dataset):
        raise BadInput(f"{len(wrong):,} of {len(dataset):,} conversations cannot be learned; the first: {wrong[0]}")
    if not tokens:
        raise BadInput(
            f"no conversation has anything to learn in its first {spec.max_length:,} tokens; give a larger max_length"
        )
    remarks = [f"left out {one}" for one in wrong[:MOST_REMARKS]]
    if len(wrong) > MOST_REMARKS:
        remarks.append(f"left out {len(wrong) - MOST_REMARKS:,} more conversations")
    done = f"{cut:,} are cut, {lost:,} are left out, since nothing to learn would be left of them"
    remarks += remark_on_length(cut + lost, len(dataset), "conversations", spec.max_length, done)
    return _token_items(spec, tokens, targets, owners, tuple(remarks))


def _token_items(
    spec: TextInput,
    tokens: Sequence[np.ndarray],
    learned: Sequence[np.ndarray],
    owners: Sequence[int],
    remarks: tuple[str, ...],
) -> Items:
    """tokens, learned: int32 [tokens] each, those that are read and those that are to be predicted."""

    def collate(rows: np.ndarray) -> Inputs:
        input_ids, attention_mask = pad([tokens[row] for row in rows], spec.pad_token_id, max_length=spec.max_length)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    targets = np.empty(len(learned), object)
    targets[:] = learned
    return Items(
        targets,
        np.array([len(row) for row in tokens], np.int64),
        np.arange(len(tokens)),
        collate,
        np.array(owners, np.int64),
        padding=UNASKED,
        remarks=remarks,
    )


def _series(dataset: Dataset, spec: SeriesInput, progress: Callable[[int, int], None]) -> Items:
    found: list[np.ndarray] = []
    for rows in _chunks(len(dataset), progress):
        for row in rows:
            with _named(dataset, row):
                found.append(series(dataset.content(row), spec))

    def collate(rows: np.ndarray) -> Inputs:
        steps, attention_mask = pad_series([found[row] for row in rows])
        return {"series": steps, "attention_mask": attention_mask}

    lengths = np.array([len(row) for row in found], np.int64)
    return Items(dataset.targets, lengths, np.arange(len(dataset)), collate)


def _vectors(dataset: Dataset, spec: VectorInput, progress: Callable[[int, int], None]) -> Items:
    vectors = np.empty((len(dataset), spec.features), np.float32)
    for rows in _chunks(len(dataset), progress):
        for row in rows:
            with _named(dataset, row):
                vectors[row] = vector(dataset.content(row), spec)
    return Items(dataset.targets, None, np.arange(len(dataset)), lambda rows: {"vector": vectors[rows]})


def _chunks(items: int, progress: Callable[[int, int], None]) -> Iterator[range]:
    for start in range(0, items, CHUNK):
        progress(start, items)
        yield range(start, min(start + CHUNK, items))
    progress(items, items)


@contextmanager
def _named(dataset: Dataset, row: int) -> Iterator[None]:
    """Say which item it was that could not be read."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{dataset.place(row)}: {error}") from error
