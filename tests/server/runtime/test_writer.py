"""A bundle that writes texts, and what must be in it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from export.bundle import MANIFEST, DamagedBundle, Manifest, TensorSpec
from server.runtime.deployment import Deployment
from server.runtime.model import load
from server.settings import Settings
from tests.server.chains import publish_translation


def changed(folder: Path, **fields: object) -> Path:
    """A translation whose manifest says something else."""
    manifest = publish_translation(folder / "repository")
    bundle = folder / "repository" / manifest.name / str(manifest.version)
    manifest = msgspec.structs.replace(manifest, **fields)
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return bundle


def test_a_whole_bundle_is_loaded_and_never_run_on_the_event_loop(tmp_path: Path) -> None:
    loaded = load(changed(tmp_path), Settings(home=tmp_path), Deployment())
    assert loaded.writer is not None
    assert loaded.writer.decoder.states == ["position", "past"]
    assert not loaded.inline


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda whole: {"graphs": {}}, "decoder.onnx"),
        (lambda whole: {"output_text": None}, "output_text"),
        (lambda whole: {"output_text": msgspec.structs.replace(whole.output_text, eos_token_id=None)}, "eos_token_id"),
        (lambda whole: {"output_text": msgspec.structs.replace(whole.output_text, tokenizer="no.json")}, "no.json"),
        (lambda whole: {"outputs": [TensorSpec(name="x", dtype="float32", shape=[], unit="1")]}, "puts out memory"),
        (lambda whole: {"task": "language_model", "output_text": None}, "export it again"),
    ],
)
def test_one_that_does_not_fit_together_is_refused(tmp_path: Path, change: object, words: str) -> None:
    assert callable(change)
    whole: Manifest = publish_translation(tmp_path / "repository")
    with pytest.raises(DamagedBundle, match=words):
        load(changed(tmp_path, **change(whole)), Settings(home=tmp_path), Deployment())
