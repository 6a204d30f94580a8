"""A decoder of a checkpoint, published as it is or quantized: what a server finds is the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from export import bundle
from export.bundle import CHAT_TEMPLATE, Generation
from export.processing.inputs import TextInput
from export.quantize import TooMuchLost
from export.untouched import export_backbone, prose
from finetune.command import export, held_out_texts
from models import registry
from models.backbones import weights
from tests.models import checkpoints
from tests.models.checkpoints import BEGIN, END, TEMPLATE, TURN
from tests.models.test_decoder_weights import FAMILIES

CONFIG = FAMILIES["llama"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small"
    checkpoints.folder(CONFIG, path)
    return path


def test_it_is_published_with_its_language(folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    made = export_backbone(str(folder), name=None, repository=tmp_path, backbones={}, progress=told.append)
    assert (made.name, made.task, made.lineage.base_model) == ("small", "language_model", str(folder))
    assert made.input == TextInput(max_length=64, pad_token_id=END, bos_token_id=BEGIN, eos_token_id=END)
    assert made.generation == Generation(context=64, end_token_ids=[END, TURN], chat_template=CHAT_TEMPLATE)
    assert made.parity.samples >= 8
    home = tmp_path / "small" / "1"
    assert msgspec.json.encode(bundle.verify(home)) == msgspec.json.encode(made)
    assert (home / CHAT_TEMPLATE).read_text() == TEMPLATE
    reference = weights.language_of(str(folder)).tokenizer
    assert (home / "tokenizer.json").read_bytes() == reference
    kept, model = registry.restore(home).eval(), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([Tokenizer.from_str(reference.decode()).encode("the cat sleeps").ids])
    with torch.no_grad():
        torch.testing.assert_close(kept(ids, torch.ones_like(ids))["logits"], model(ids).logits, atol=1e-4, rtol=1e-4)
    card = (home / "MODEL_CARD.md").read_text()
    assert "at most 64 tokens; the tokens `1`, `2` end it" in card
    assert "v1/chat/completions" in card
    assert "kept in float32" in card
    assert any("agree on" in words for words in told)


def test_weights_beside_the_graph_are_verified_like_the_graph(folder: Path, tmp_path: Path) -> None:
    made = export_backbone(str(folder), name="small", repository=tmp_path, backbones={})
    home = tmp_path / "small" / "1"
    weights_of_graph = home / "model.onnx.data"
    whole = weights_of_graph.read_bytes()
    assert made.files["model.onnx.data"].bytes == len(whole)
    weights_of_graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(bundle.DamagedBundle, match=r"model\.onnx\.data: sha256"):
        bundle.verify(home)
    weights_of_graph.unlink()
    with pytest.raises(bundle.DamagedBundle, match=r"model\.onnx\.data: missing"):
        bundle.verify(home)
    weights_of_graph.write_bytes(whole)
    files = {name: digest for name, digest in made.files.items() if name != weights_of_graph.name}
    (home / bundle.MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(made, files=files)))
    with pytest.raises(bundle.DamagedBundle, match=r"lists no model\.onnx\.data"):
        bundle.verify(home)


def test_quantized_weights_are_judged_before_they_are_published(folder: Path, tmp_path: Path) -> None:
    made = export_backbone(str(folder), name="eight", repository=tmp_path, backbones={}, kept_as="int8", most_loss=0.5)
    assert made.generation is not None
    assert made.generation.weights == "int8"
    assert made.metrics["held_out_tokens"] > 500
    assert made.metrics["int8_bytes"] < made.metrics["float32_bytes"]
    home = tmp_path / "eight" / "1"
    assert msgspec.json.encode(bundle.verify(home)) == msgspec.json.encode(made)
    card = (home / "MODEL_CARD.md").read_text()
    assert f"| int8 | {made.metrics['int8_perplexity']:.4g} |" in card
    assert {tensor.dtype for tensor in registry.restore(home).parameters()} == {torch.float32}
    with pytest.raises(TooMuchLost, match="Nothing is published"):
        export_backbone(str(folder), name="four", repository=tmp_path, backbones={}, kept_as="int4", most_loss=-1.0)
    assert bundle.names(tmp_path) == ["eight"]
    assert not list((tmp_path / ".staging").iterdir())
    with pytest.raises(ValueError, match="int8 is for language models"):
        export_backbone("minilm-l6-v2", name=None, repository=tmp_path, backbones={}, kept_as="int8")


def test_the_command_judges_on_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = tmp_path / "chats.jsonl"
    turn = {"role": "user", "content": "the cat sleeps today"}
    chats.write_text("".join(json.dumps(line) + "\n" for line in ({"messages": [turn]}, {"text": "the dog sleeps"})))
    status = export(
        str(folder),
        name="small",
        weights="int8",
        held_out=chats,
        most_loss=0.5,
        repository=tmp_path / "repository",
        backbones={},
    )
    assert status == 0, capsys.readouterr().out
    made = bundle.read_manifest(tmp_path / "repository" / "small" / "1")
    language = weights.language_of(str(folder))
    texts = held_out_texts(chats, language)
    assert texts == ["user: the cat sleeps today<|im_end|>\n", "the dog sleeps"]
    tokenizer = Tokenizer.from_str(language.tokenizer.decode())
    assert made.metrics["held_out_tokens"] == sum(len(tokenizer.encode(text).ids) - 1 for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": 1}\n', r"a\.jsonl:2: .*str"),
        ("a.jsonl", "{}\n", r"a\.jsonl:1: has neither"),
        ("a.txt", "\n\n", r"a\.txt holds no text"),
        ("b.txt", None, r"b\.txt cannot be read"),
    ],
)
def test_a_file_of_held_out_texts_is_named_with_its_line(
    name: str, content: str | None, words: str, folder: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        held_out_texts(tmp_path / name, weights.language_of(str(folder)))


def test_there_is_prose_on_every_machine() -> None:
    found = prose()
    assert len(found) >= 16
    assert sum(len(text) for text in found) > 25_000
    assert all(text.count(" ") > 40 for text in found)


@pytest.mark.slow
def test_the_packaged_decoder_loses_little_in_8_bits(tmp_path: Path) -> None:
    made = export_backbone(
        "smollm2-135m-instruct", name=None, repository=tmp_path, backbones={}, kept_as="int8", most_loss=0.02
    )
    assert made.generation == Generation(context=8192, end_token_ids=[2], chat_template=CHAT_TEMPLATE, weights="int8")
    assert made.input == TextInput(max_length=8192, pad_token_id=2, bos_token_id=None, eos_token_id=2)
    assert 5 < made.metrics["float32_perplexity"] < 60
    assert made.metrics["int8_bytes"] < 0.26 * made.metrics["float32_bytes"]
    assert "licence of its weights: Apache-2.0" in (tmp_path / made.name / "1" / "MODEL_CARD.md").read_text()
