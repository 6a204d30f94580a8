"""Step decoding: a graph that answers the next token, run again and again, for all rows of a batch in lockstep.

Tensors find each other by name. What the step graph puts out as `next_X` goes in as `X` the next time: a state. Its
other inputs are the token, the mask, and the memory: what an encoder has put out by these names, the same in every
step. A state that no encoder puts out begins empty: every dynamic dimension but the batch is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from export.bundle import TensorSpec
from export.processing.text import pad
from server.runtime.search import Candidate, Listener, Options, Search

NEXT = "next_"
SUPPLIED = ("token", "attention_mask")


class Runs(Protocol):
    """What is asked of a session."""

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Prompt:
    """One row. tokens: of the source of a translation, at least one.
    listener: of a row with one sequence. done: told the answers at once, when others in the batch still go on."""

    tokens: list[int]
    options: Options
    listener: Listener | None = None
    done: Callable[[list[Candidate]], object] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Encoder:
    """What reads the source of a translation, once a row; `outputs` by name, padding of its input."""

    session: Runs
    outputs: Sequence[TensorSpec]
    pad_token_id: int
    max_length: int


class StepDecoder:
    """An encoder, and the session of its step graph."""

    def __init__(
        self,
        encoder: Encoder,
        session: Runs,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        begin: int,
        end: int,
        text: Callable[[list[int]], str],
        max_sequences: int,
    ) -> None:
        """inputs, outputs: of the step graph. begin, end: the tokens around an answer; text: of an answer's tokens.
        max_sequences: that run together, beams and what is drawn side by side counted.

        Raises ValueError, naming the tensor, for graphs that do not fit together.
        """
        self.encoder, self.session = encoder, session
        self.begin, self.end, self.text, self.max_sequences = begin, end, text, max_sequences
        given, answered = {tensor.name: tensor for tensor in inputs}, {tensor.name for tensor in outputs}
        encoded = {tensor.name for tensor in encoder.outputs}
        self.states = [name for name in given if NEXT + name in answered]
        self.memory = [name for name in given if name not in self.states and name not in SUPPLIED]
        self.empty = [given[name] for name in self.states if name not in encoded]
        self.encoded = [name for name in (*self.memory, *self.states) if name in encoded]
        self.attends = "attention" in answered
        if "token" not in given:
            raise ValueError("the step graph has no input token")
        if lost := [name for name in self.memory if name not in encoded]:
            raise ValueError(f"nothing puts out {lost[0]}, which the step graph takes")
        if lost := [name for name in answered if name.startswith(NEXT) and name[len(NEXT) :] not in given]:
            raise ValueError(f"the step graph puts out {lost[0]} and takes no {lost[0][len(NEXT) :]}")
        if "logits" not in answered:
            raise ValueError("the step graph puts out no logits")
        self.masked = "attention_mask" in given

    def decode(self, prompts: Sequence[Prompt]) -> list[list[Candidate]]:
        """The answers of each prompt, best first, `options.n` of them."""
        found: list[list[Candidate]] = []
        group: list[Prompt] = []
        for prompt in prompts:
            if group and sum(one.options.sequences for one in [*group, prompt]) > self.max_sequences:
                found += self._decode(group)
                group = []
            group.append(prompt)
        return found + self._decode(group)

    def _decode(self, prompts: Sequence[Prompt]) -> list[list[Candidate]]:
        options = [prompt.options for prompt in prompts]
        search = Search(options, self.end, self.text, [prompt.listener for prompt in prompts])
        attending = self.attends and search.attending
        wanted = ["logits", *(NEXT + name for name in self.states), *(["attention"] if attending else [])]
        answers: list[list[Candidate]] = [[] for _ in prompts]
        now, memory, states = self._read(prompts)
        while len(search.owner):
            found = dict(zip(wanted, self.session.run({**now, **memory, **states}, wanted), strict=True))
            owner = search.owner
            parents = search.advance(found["logits"], found.get("attention"))
            # Beams that change places within their row leave its memory as it is, and no row is finished.
            if not np.array_equal(search.owner, owner):
                memory = {name: value.take(parents, axis=0) for name, value in memory.items()}
                for row in np.setdiff1d(owner, search.owner).tolist():
                    prompt = prompts[row]
                    answers[row] = [trimmed(candidate, len(prompt)) for candidate in search.answers(row)]
                    if prompt.done is not None:
                        prompt.done(answers[row])
            states = {name: found[NEXT + name] for name in self.states}
            if not np.array_equal(parents, np.arange(len(owner))):
                states = {name: value.take(parents, axis=0) for name, value in states.items()}
            now = {"token": search.tokens[:, None]}
        return answers

    def _read(
        self, prompts: Sequence[Prompt]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What the first step takes: tokens, memory and states."""
        rows = [prompt.tokens for prompt in prompts]
        states = {tensor.name: beginning(tensor, len(rows)) for tensor in self.empty}
        ids, mask = pad(rows, self.encoder.pad_token_id, self.encoder.max_length)
        inputs = {"input_ids": ids, "attention_mask": mask}
        encoded = dict(zip(self.encoded, self.encoder.session.run(inputs, self.encoded), strict=True))
        memory = {name: encoded[name] for name in self.memory}
        if self.masked:
            memory["attention_mask"] = mask
        states |= {name: encoded[name] for name in self.states if name in encoded}
        return {"token": np.full((len(rows), 1), self.begin)}, memory, states


def trimmed(candidate: Candidate, source: int) -> Candidate:
    """The candidate without its attention to the padding behind so many tokens."""
    attention = candidate.attention
    return candidate if attention is None else replace(candidate, attention=attention[:, :source])


def beginning(tensor: TensorSpec, rows: int) -> np.ndarray:
    """A state before the first step: nothing along its dynamic dimensions, zeros where it has none."""
    behind = [size if isinstance(size, int) else 0 for size in tensor.shape[1:]]
    return np.zeros((rows, *behind), np.dtype(tensor.dtype))
