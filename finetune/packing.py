"""Several texts in one row: the texts of a batch lie behind each other in as few rows as hold them.

Texts see nothing of each other, so the loss is the one of the texts row by row; what is saved is the padding behind the
shorter ones, and batches may be of any texts, not of those alike in length: a step's mean is then one over a fair draw,
and steps are nearly equal in tokens. Nothing is drawn here: a resumed run goes on as it was.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from export.processing.text import PADDING_MULTIPLE

# Rows are as wide as the longest text, or up to so many times as wide.
WIDEST = 4
# A row of so many places spends as much on attention as on all else, in layers about 500 numbers wide.
ATTENTION = 3072


@dataclass(frozen=True)
class Packing:
    """row, start, segment: of each text, the row it lies in, the place it begins at, and its number there, from 1."""

    rows: int
    width: int
    row: list[int]
    start: list[int]
    segment: list[int]


def pack(lengths: Sequence[int], most: int) -> Packing:
    """Best-fit decreasing (Johnson 1973): from the longest text to the shortest, each in the fullest row that has room
    for it. It takes at most 11/9 of the fewest rows possible.

    lengths: tokens of each text. most: of a row, which a single longer text exceeds. Of rows as wide as the longest
    text, twice, three and four times as wide, those that are computed soonest are taken: few places in all, and none
    that looks back on many.
    """
    longest = max(lengths)
    widths = [longest, *(times * longest for times in range(2, WIDEST + 1) if times * longest <= most)]
    return min(
        (_pack(lengths, width, most) for width in widths),
        key=lambda found: found.rows * found.width * (1.0 + found.width / ATTENTION),
    )


def _pack(lengths: Sequence[int], width: int, most: int) -> Packing:
    used: list[int] = []
    room: list[tuple[int, int]] = []  # (places left, row), ascending
    row, start, segment = ([0] * len(lengths) for _ in range(3))
    count: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        length = lengths[text]
        fitting = bisect_left(room, (length, 0))
        if fitting < len(room):
            left, at = room.pop(fitting)
        else:
            left, at = width, len(used)
            used.append(0)
            count.append(0)
        row[text], start[text], segment[text] = at, used[at], count[at] + 1
        used[at] += length
        count[at] += 1
        insort(room, (left - length, at))
    fullest = max(used)
    rounded = min(-(-fullest // PADDING_MULTIPLE) * PADDING_MULTIPLE, max(most, fullest))
    return Packing(len(used), rounded, row, start, segment)


@dataclass(frozen=True)
class Packed:
    """input_ids, segments: int64 [rows, width], segments 0 where nothing is. place: int64 [texts, tokens], where each
    token of the texts lies, counted row by row."""

    input_ids: Tensor
    segments: Tensor
    place: Tensor


def packed(input_ids: Tensor, attention_mask: Tensor, lengths: Tensor, most: int) -> Packed:
    """Texts in rows. input_ids, attention_mask: int64 [texts, tokens]; lengths: int64 [texts], the tokens that count of
    each, all others behind them. A token that the mask hides is hidden still."""
    device = input_ids.device
    found = pack(lengths.tolist(), most)
    row, start, segment = (torch.tensor(one, device=device) for one in (found.row, found.start, found.segment))
    within = torch.arange(input_ids.shape[1], device=device)
    place = (row * found.width + start)[:, None] + within
    there = within < lengths[:, None]
    ids = input_ids.new_zeros(found.rows * found.width)
    segments = torch.zeros_like(ids)
    ids[place[there]] = input_ids[there]
    segments[place[there]] = (attention_mask * segment[:, None])[there]
    return Packed(ids.view(found.rows, -1), segments.view(found.rows, -1), place)
