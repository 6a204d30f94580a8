"""Conversations go the whole path with OpenAI's own client: a file, a job that names nothing but it, and a chat."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from transformers import LlamaConfig

from demo.datasets import catalogue
from export import bundle
from export.processing.chat import Message, render
from export.processing.text import TextProcessor
from finetune.greedy import answers
from models import registry
from server.settings import Settings
from tests.models import checkpoints
from tests.models.test_decoder_weights import SMALL
from tests.server.conftest import Live, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose operator has a decoder of random weights, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoints.folder(LlamaConfig(**{**SMALL, "max_position_embeddings": 256}), folder)
    home = tmp_path_factory.mktemp("home")
    with running(Settings(home=home, port=0, poll_seconds=0.2, backbones={"tiny": str(folder)})) as server:
        yield server


def test_a_file_of_conversations_is_all_that_a_job_needs(live: Live) -> None:
    pairs = [pair for pair in catalogue("it") if len(pair[0]) < 60][:60]
    lines = [
        {"messages": [{"role": "user", "content": english}, {"role": "assistant", "content": italian}]}
        for english, italian in pairs
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with openai.OpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(file=("chats.jsonl", content), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        deadline = time.monotonic() + 300
        while (job := client.fine_tuning.jobs.retrieve(job.id)).finished_at is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        told = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100).data]
        assert job.status == "succeeded", told
        assert any(one.startswith("perplexity ") and one.endswith(" before") for one in told)
        assert job.fine_tuned_model is not None
        folder = Path(live.settings.repository) / "tiny" / "1"
        manifest = bundle.verify(folder)
        assert manifest.metrics["perplexity"] < manifest.metrics["perplexity_before"]
        asked = pairs[0][0]
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": asked}], temperature=0, max_completion_tokens=20
        )
    assert manifest.generation is not None
    assert manifest.generation.chat_template is not None
    template = (folder / manifest.generation.chat_template).read_text()
    texts = TextProcessor(manifest.input, (folder / "tokenizer.json").read_bytes())  # type: ignore[arg-type]
    text = render(template, [Message("user", asked)], generate=True, bos="<s>", eos="</s>")
    prompt = texts.tokenizer.encode(text, add_special_tokens=False).ids
    network = registry.restore(folder).eval()
    (expected,) = answers(network, [prompt], ends=manifest.generation.end_token_ids, max_tokens=20)
    assert answer.choices[0].message.content == texts.decode(expected)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)


def test_what_is_wrong_with_a_file_is_told_before_anything_is_learned(live: Live) -> None:
    right = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ciao"}]}
    wrong = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Ciao"}]}
    content = "\n".join(json.dumps(line) for line in (right, wrong)).encode()
    file_id = live.file_id("chats.jsonl", content)
    report = live.client.get(f"/v1/files/{file_id}/report").json()
    assert (report["kind"], report["items"]) == ("chats", 1)
    (problem,) = report["problems"]
    assert problem["place"] == "line 2"
    assert problem["message"].startswith("messages[1].role: 'bot'")
    refused = live.client.post("/v1/fine_tuning/jobs", json={"model": "mlp", "training_file": file_id})
    assert refused.status_code == 400
