"""Transformers go the whole path: trained by a job from real texts, exported, asked over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from demo.datasets import catalogue
from export.bundle import Generation, Manifest
from finetune.greedy import translate
from finetune.vocabulary import BOS, EOS
from models import registry
from models.transformer import Translator
from models.transformer_decoder import CausalNetwork
from tests.e2e.conftest import published
from tests.e2e.test_sequences import right
from tests.server.conftest import Live

pytestmark = pytest.mark.slow

SIZES = {"vocabulary_size": 400, "layers": 2, "heads": 2, "width": 32}


def quick(epochs: int, rate: float = 0.005) -> dict[str, Any]:
    return {"n_epochs": epochs, "batch_size": 16, "learning_rate": rate}


def sentences(language: str, most: int) -> list[str]:
    return sorted({text for _, text in catalogue(language) if len(text) < 80})[:most]


def whole(live: Live, manifest: Manifest) -> tuple[Any, Tokenizer]:
    """The network as it was trained, and its tokenizer."""
    folder = Path(live.settings.repository) / manifest.name / str(manifest.version)
    return registry.restore(folder).eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def written(network: CausalNetwork, prompt: list[int], most: int) -> list[int]:
    """The likeliest token behind the likeliest token, each time from the whole text anew."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        row = torch.tensor([ids])
        with torch.no_grad():
            logits = network(row, torch.ones_like(row))["logits"]
        token = int(logits[0, -1].argmax())
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_a_decoder_goes_on_over_http_as_in_pytorch(live: Live) -> None:
    texts = sentences("it", 200)
    manifest = published(
        live,
        [{"text": text} for text in texts],
        name="tales",
        model={"architecture": "transformer_decoder", "hyperparameters": SIZES},
        max_length=64,
        hyperparameters=quick(6),
    )
    assert manifest.task == "language_model"
    assert manifest.generation == Generation(context=64, end_token_ids=[EOS])
    assert manifest.metrics["perplexity"] < manifest.metrics["unigram_perplexity"]
    network, tokenizer = whole(live, manifest)
    # Together, so that most are padded; and one is empty, which goes on from the beginning.
    prompts = ["", *(" ".join(text.split()[:count]) for count, text in zip((1, 2, 3, 5), texts[::40], strict=False))]
    expected = []
    for prompt in prompts:
        ids = [BOS, *tokenizer.encode(prompt, add_special_tokens=False).ids]
        expected.append(tokenizer.decode(written(network, ids, 20)))
    body = {"model": "tales", "prompt": prompts, "temperature": 0, "max_tokens": 20}
    answer = live.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert [choice["text"] for choice in answer.json()["choices"]] == expected
    assert len(set(expected)) > 1


def test_a_translation_over_http_is_that_of_pytorch(live: Live) -> None:
    pairs = [(source, target) for source, target in catalogue("it") if len(target) < 60][:200]
    manifest = published(
        live,
        [{"text": source, "translation": target} for source, target in pairs],
        name="italian",
        model={"architecture": "transformer", "hyperparameters": SIZES},
        max_length=48,
        hyperparameters=quick(6),
    )
    assert manifest.task == "translation"
    network, tokenizer = whole(live, manifest)
    assert isinstance(network, Translator)
    folder = Path(live.settings.repository) / "italian" / "1"
    target = Tokenizer.from_file(str(folder / "target_tokenizer.json"))
    sources = [source for source, _ in pairs[::40]]
    encoded = [tokenizer.encode(source).ids for source in sources]
    expected = []
    for ids in encoded:
        row = torch.tensor([ids])
        (answer,) = translate(network, row, torch.ones_like(row), begin=BOS, end=EOS, max_tokens=12)
        expected.append(target.decode(answer))
    body = {"model": "italian", "prompt": sources, "max_tokens": 12, "attention": True}
    found = live.client.post("/v1/completions", json=body)
    assert found.status_code == 200, found.text
    choices = found.json()["choices"]
    assert [choice["text"] for choice in choices] == expected
    for ids, choice in zip(encoded, choices, strict=True):
        shares = np.array(choice["attention"]["weights"])
        assert shares.shape == (len(choice["attention"]["target"]), len(ids))
        np.testing.assert_allclose(shares.sum(1), 1.0, atol=1e-5)
    beams = live.client.post("/v1/completions", json={"model": "italian", "prompt": sources[0], "beams": 3})
    assert beams.status_code == 200, beams.text


def test_what_was_learned_without_labels_is_fine_tuned_with_few(live: Live) -> None:
    texts = [(text, language) for language in ("it", "es") for text in sentences(language, 150)]
    masked = published(
        live,
        [{"text": text} for text, _ in texts],
        name="read",
        model={"architecture": "transformer_encoder", "hyperparameters": SIZES},
        objective={"type": "masked_tokens"},
        max_length=48,
        hyperparameters=quick(3),
    )
    assert masked.task == "masked_language_model"
    found = live.client.post("/v1/embeddings", json={"model": "read", "input": [texts[0][0], texts[-1][0]]})
    assert [len(one["embedding"]) for one in found.json()["data"]] == [32, 32]

    few = [{"text": text, "label": language} for text, language in texts[::5]]
    tuned = published(
        live,
        few,
        name="tongues",
        model="read",
        objective={"type": "cross_entropy"},
        hyperparameters=quick(8, 0.002),
        data={"validation": 0.2},
    )
    assert tuned.task == "classification"
    assert tuned.lineage.base_model == "read:1"
    assert tuned.files["tokenizer.json"] == masked.files["tokenizer.json"]
    others = [(text, language) for i, (text, language) in enumerate(texts) if i % 5]
    assert right(live, "tongues", [text for text, _ in others], [language for _, language in others]) > 0.7
