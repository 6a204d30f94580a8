"""A pre-trained decoder learns a language in little memory: a job of OpenAI's client, whose worker is killed on the
way, publishes what answers chats in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors import safe_open

from demo.datasets import catalogue
from export import bundle
from tests.server.conftest import Live

pytestmark = pytest.mark.slow

PAIRS, ASKED = 200, 8
INSTRUCTION = {"role": "system", "content": "Translate into Italian."}


def pairs() -> list[tuple[str, str]]:
    """Short English messages and their translations, each once, in an order that means nothing."""
    short = {english: text for english, text in catalogue("it", 1) if 10 <= len(english) < 70 and len(text) < 80}
    return sorted(short.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def chat(english: str) -> list[dict[str, str]]:
    return [INSTRUCTION, {"role": "user", "content": english}]


def rows(learned: Sequence[tuple[str, str]]) -> bytes:
    chats = [{"messages": [*chat(english), {"role": "assistant", "content": text}]} for english, text in learned]
    return "".join(json.dumps(row) + "\n" for row in chats).encode()


def spelled(texts: Sequence[str]) -> set[str]:
    return set(re.findall(r"\w+", " ".join(texts).casefold()))


@pytest.mark.timeout(1800)
def test_an_adapter_learns_italian_is_killed_goes_on_and_answers(live: Live, client: openai.OpenAI) -> None:
    known = pairs()
    file = client.files.create(file=("chats.jsonl", rows(known[:PAIRS])), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 1.5}
    job = client.fine_tuning.jobs.create(
        model="smollm2-135m-instruct",
        training_file=file.id,
        seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        extra_body={
            "name": "italian",
            "transfer": {"lora": {"rank": 16}},
            "max_length": 128,
            "precision": "bfloat16",
            "data": {"validation": 0.2},
            "checkpoint_seconds": 2,
        },
    )
    killed = False
    while client.fine_tuning.jobs.retrieve(job.id).status not in ("succeeded", "failed", "cancelled"):
        if not killed and live.store.get_job(job.id).metrics.get("step", 0) >= 4:
            os.kill(live.server.application.state.executor.pid, signal.SIGKILL)
            killed = True
        time.sleep(0.2)
    told = "\n".join(event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100))
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded", told
    assert killed
    assert "the worker process died (signal 9" in told
    assert re.search(r"going on from the checkpoint of step [1-9]", told), told
    assert re.search(r"[34]\.\d % of 1\d\d M parameters learn", told), told

    manifest = bundle.verify(Path(live.settings.repository) / "italian" / "1")
    assert manifest.lineage.base_model == "smollm2-135m-instruct"
    assert manifest.metrics["perplexity"] < 0.5 * manifest.metrics["perplexity_before"]
    with safe_open(
        Path(live.settings.repository) / "italian" / "1" / "adapter" / "adapter_model.safetensors", "pt"
    ) as it:
        assert len(list(it.keys())) == 2 * 7 * 30, "two matrices of seven layers in thirty blocks"

    deadline = time.monotonic() + 120
    while "italian" not in [model.id for model in client.models.list()]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    answers = []
    for english, _ in known[PAIRS : PAIRS + ASKED]:
        messages: Any = chat(english)
        answer = client.chat.completions.create(model="italian", messages=messages, temperature=0, max_tokens=40)
        assert answer.choices[0].finish_reason == "stop", "it has learned to end its turn"
        answers.append(answer.choices[0].message.content or "")
    english, italian = (spelled([pair[side] for pair in known]) for side in (0, 1))
    words = spelled(answers)
    assert len(words & (italian - english)) > 3 * len(words & (english - italian)), answers
