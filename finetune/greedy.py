"""Greedy decoding in PyTorch, through the step graphs that are exported: what a server answers at temperature 0."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from export.processing.text import pad
from models.network import Graph, Network

NEXT = "next_"


@torch.no_grad()
def translate(
    network: Network,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    begin: int,
    end: int,
    max_tokens: int,
    between: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The likeliest token behind the likeliest token, of all rows in lockstep; without `begin` and `end`.

    input_ids, attention_mask: int64 [batch, sequence], on the network's device; the network is in evaluation mode.
    max_tokens: of a row that does not end before. between: called before every step; what it raises ends the work.
    """
    graphs = network.graphs()
    encoder, decoder = graphs["model"], graphs["decoder"]
    known = {"input_ids": input_ids, "attention_mask": attention_mask, **encoder.module(input_ids, attention_mask)}
    states = [name for name in decoder.inputs if NEXT + name in decoder.outputs]
    if empty := [name for name in states if name not in known]:
        example = decoder.examples({"input_ids": input_ids, "attention_mask": attention_mask})[0]
        known |= {name: beginning(decoder, name, example[name]) for name in empty}
    token = torch.full_like(input_ids[:, :1], begin)
    written: list[Tensor] = []
    going = torch.ones_like(token[:, 0], dtype=torch.bool)
    while len(written) < max_tokens and bool(going.any()):
        between()
        known["token"] = token
        found = decoder.module(*(known[name] for name in decoder.inputs))
        known |= {name: found[NEXT + name] for name in states}
        token = found["logits"].argmax(1, keepdim=True)
        written.append(token[:, 0])
        going &= token[:, 0] != end
    rows = torch.stack(written, dim=1).tolist() if written else [[] for _ in input_ids]
    return [row[: row.index(end)] if end in row else row for row in rows]


def beginning(graph: Graph, name: str, example: Tensor) -> Tensor:
    """A state before the first step that no encoder puts out: nothing along its dynamic axes."""
    dynamic = graph.axes.get(name, {})
    return example.new_zeros([0 if axis in dynamic else size for axis, size in enumerate(example.shape)])


@torch.no_grad()
def answers(
    network: Network,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    max_tokens: int,
    between: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """How a language model goes on with each of a few prompts, without the token that ends it: everything is read again
    for every token. The network is in evaluation mode; `between` is as in `translate`."""
    device = next(network.parameters()).device
    rows = [list(prompt) for prompt in prompts]
    going = list(range(len(rows)))
    for _ in range(max_tokens):
        between()
        ids, mask = (torch.from_numpy(one).to(device) for one in pad([rows[i] for i in going], 0, max_length=0))
        last = torch.tensor([len(rows[i]) - 1 for i in going], device=device)
        asked = torch.arange(ids.shape[1], device=device) == last[:, None]
        for i, token in zip(going, network(ids, mask, asked)["logits"].argmax(1).tolist(), strict=True):
            rows[i].append(token)
        going = [i for i in going if rows[i][-1] not in ends]
        if not going:
            break
    written = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    return [row[:-1] if row and row[-1] in ends else row for row in written]
