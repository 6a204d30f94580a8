"""500 streams of a small decoder, started and dropped at random over a real socket."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.generation.contenders import listening
from benchmarks.generation_soak import Soak, soak
from export.bundle import Generation, Lineage
from export.bundling import bundle
from export.processing.inputs import TextInput
from tests.models import checkpoints

CONTEXT, SLOTS = 512, 8
SHARED = "the cat and the dog of the house in the garden sleep "
PROMPTS = [
    f"{front}{i}{end}" for i in range(6) for front, end in (("", " cats sleep"), (SHARED, ""), ("dog ", " times" * i))
]


def publish(repository: Path) -> None:
    model = checkpoints.drawn(checkpoints.llama(CONTEXT), seed=1)
    # Drawn larger than usual: what follows depends on the whole prompt, and does not fall into a few tokens' circle.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    network = checkpoints.network_of(model, CONTEXT)
    ids = np.arange(3, 19).reshape(2, 8)
    bundle(
        network.eval(),
        name="small",
        repository=repository,
        input=TextInput(max_length=CONTEXT, pad_token_id=0),
        labels=[],
        tokenizer=checkpoints.tokenizer(begins=False).to_str().encode(),
        generation=Generation(context=CONTEXT, end_token_ids=[checkpoints.END], weights="float32"),
        validation=[{"input_ids": ids, "attention_mask": np.ones_like(ids)}],
        metrics={},
        evaluation=None,
        lineage=Lineage(base_model="small"),
    )


@pytest.mark.slow
def test_streams_that_come_and_go_leave_nothing_behind_and_get_their_own_words(tmp_path: Path) -> None:
    publish(tmp_path / "repository")
    flags = ["--home", str(tmp_path / "home"), "--repository", str(tmp_path / "repository"), "--no-worker"]
    command = [sys.executable, "-m", "server", *flags, "--generation-slots", str(SLOTS)]
    with listening(command, "/health/ready") as port:
        run = Soak(f"http://127.0.0.1:{port}", "small", PROMPTS, SLOTS, tokens=100, streams=500)
        asyncio.run(soak(run, most_growth=16 * 2**20))
    assert run.problems == []
    assert sum(run.endings.values()) == 500
    kinds = ("read to its end", "dropped after some events", "dropped while it ran", "dropped before a word")
    assert all(run.endings[kind] for kind in kinds), run.endings
