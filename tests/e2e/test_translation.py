"""A recurrent translation model goes the whole path: trained by a job from Django's pairs, asked over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from demo.datasets import catalogue
from export.bundle import Manifest
from export.processing.inputs import TextInput
from export.processing.text import TextProcessor, pad
from finetune.greedy import translate
from finetune.vocabulary import BOS, EOS, PAD
from models import registry
from tests.e2e.conftest import published
from tests.server.conftest import Live, message_of

pytestmark = pytest.mark.slow

Pair = tuple[str, str]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """The 150 shortest that have one translation, and ten long ones, which are never learned."""
    found = dict(sorted(catalogue("it", shortest=1), reverse=True))
    ordered = sorted(found.items(), key=lambda pair: (len(pair[0] + pair[1]), pair))
    return ordered[:150] + ordered[600:610]


@pytest.fixture(scope="module")
def manifest(live: Live, pairs: list[Pair]) -> Manifest:
    """Validated on what it learns from: the weights are kept that know it by heart."""
    rows = [{"text": text, "translation": translation} for text, translation in pairs[:150]]
    sizes = {"vocabulary_size": 400, "width": 64, "embedding": 48, "dropout": 0.0}
    return published(
        live,
        rows,
        validation_file=live.file_id("same.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()),
        name="italian",
        model={"architecture": "seq2seq", "hyperparameters": sizes},
        max_length=200,
        hyperparameters={"n_epochs": 40, "batch_size": 16, "learning_rate": 0.008},
    )


def in_pytorch(live: Live, manifest: Manifest, texts: list[str]) -> list[str]:
    """Greedy translations of the published weights."""
    folder = Path(live.settings.repository) / manifest.name / str(manifest.version)
    assert isinstance(manifest.input, TextInput)
    assert manifest.output_text is not None
    source = TextProcessor(manifest.input, (folder / manifest.input.tokenizer).read_bytes())
    target = TextProcessor(manifest.output_text, (folder / manifest.output_text.tokenizer).read_bytes())
    inputs = [torch.from_numpy(array) for array in pad(source.encode(texts), PAD, 200)]
    network = registry.restore(folder).eval()
    return [target.decode(row) for row in translate(network, *inputs, begin=BOS, end=EOS, max_tokens=200)]


def ask(live: Live, prompt: str | list[str], **more: Any) -> list[dict[str, Any]]:
    response = live.client.post("/v1/completions", json={"model": "italian", "prompt": prompt, **more})
    assert response.status_code == 200, response.text
    return response.json()["choices"]  # type: ignore[no-any-return]


def test_http_answers_what_pytorch_answers(live: Live, manifest: Manifest, pairs: list[Pair]) -> None:
    texts = [text for text, _ in pairs]
    found = [choice["text"] for choice in ask(live, texts)]
    assert found == in_pytorch(live, manifest, texts)
    right = [translation == wanted for translation, (_, wanted) in zip(found, pairs[:150], strict=False)]
    assert np.mean(right) > 0.6, "most of what was learned is known"
    assert [choice["text"] for text in texts[:20] for choice in ask(live, text)] == found[:20], "alone as together"


def test_a_translation_is_streamed_as_it_is_written(live: Live, manifest: Manifest, pairs: list[Pair]) -> None:
    text = pairs[-1][0]
    (whole,) = ask(live, text, max_tokens=30)
    with openai.OpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="italian", prompt=text, max_tokens=30, stream=True)
        pieces = [event.choices[0].text for event in stream if event.choices]
    assert "".join(pieces) == whole["text"]
    assert len(pieces) > 3


def test_what_was_attended_to_comes_back(live: Live, manifest: Manifest, pairs: list[Pair]) -> None:
    for choice in ask(live, [text for text, _ in pairs[100::8]], attention=True):
        found = choice["attention"]
        weights = np.array(found["weights"])
        assert weights.shape == (len(found["target"]), len(found["source"]))
        assert (found["source"][0], found["source"][-1]) == ("[BOS]", "[EOS]")
        np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-5)
        assert weights.std(0).max() > 0.01, "other weights at other steps"


def test_beams_find_likelier_translations(live: Live, manifest: Manifest, pairs: list[Pair]) -> None:
    texts = [text for text, _ in pairs[100:]]

    def likelihood(**more: Any) -> np.ndarray:
        choices = ask(live, texts, logprobs=0, max_tokens=40, **more)
        return np.array([sum(choice["logprobs"]["token_logprobs"]) for choice in choices])

    greedy, beams = likelihood(), likelihood(beams=4, length_penalty=0.0)
    assert beams.mean() > greedy.mean()
    assert (beams > greedy - 1e-3).mean() > 0.8


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/embeddings", {"input": "Yes"}, "italian does not embed; ask it at /v1/completions"),
        ("/v1/classify", {"input": "Yes"}, "italian does not classify; ask it at /v1/completions"),
        ("/v1/completions", {"prompt": "no " * 300}, "longer than 200 tokens"),
        ("/v1/completions", {"prompt": " "}, "empty"),
    ],
)
def test_what_it_cannot_do_is_refused_in_words(
    live: Live, manifest: Manifest, path: str, body: dict[str, Any], words: str
) -> None:
    assert words in message_of(live.client.post(path, json={"model": "italian", **body}), 400)


def test_the_report_of_a_file_says_that_it_holds_pairs(live: Live) -> None:
    rows = b"text,translation\nyes,s\xc3\xac\nno,no\nno,no\nperhaps,\n"
    found = live.client.get(f"/v1/files/{live.file_id('pairs.csv', rows)}/report").json()
    assert (found["kind"], found["items"], found["columns"]) == ("pairs", 3, ["text", "translation"])
    assert found["problems"] == [{"place": "row 5", "message": "the translation is empty, or no text"}]
    assert found["duplicates"] == [{"place": "row 4", "first": "row 3"}]
