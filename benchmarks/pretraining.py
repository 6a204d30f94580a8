"""What learning from unlabelled texts is worth when labels are few: python -m benchmarks.pretraining

A small Transformer encoder tells 18 languages apart, from a few labelled sentences of Django's catalogues each: once
from random weights, once after it has learned hidden tokens in the training sentences without their labels. It is
measured on sentences of which the training data have no translation either.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from demo.datasets import LANGUAGES, Sentence, languages
from export import bundle
from export.bundle import Manifest
from export.processing.inputs import TextInput
from export.processing.text import TextProcessor, pad
from finetune.recipe import CrossEntropy, Data, Hyperparameters, MaskedTokens, Recipe
from finetune.run import RunRequest, run
from finetune.run_request import FileRef
from models.spec import ModelSpec

SIZES = {"vocabulary_size": 1000, "layers": 2, "heads": 4, "width": 64}
LABELLED = (4, 16)
SEEDS = (1, 2, 3)
MASKED_EPOCHS, MASKED_RATE = 20, 0.003
LENGTH = 64


class Quiet:
    """A reporter that only says how each job ended."""

    def state(self, stage: str) -> None: ...

    def event(
        self, message: str, *, level: str = "info", type: str = "message", data: dict[str, Any] | None = None
    ) -> None:
        if type == "evaluation" and " with the weights of " in message:
            print(f"    {message}", flush=True)

    def metrics(self, step: int, **values: float | None) -> None: ...

    def checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None: ...

    def cancelled(self) -> bool:
        return False


def job(folder: Path, name: str, rows: list[dict[str, str]], **recipe: Any) -> Manifest:
    """Train on the rows and publish under this name."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = FileRef(path=path, filename=path.name, sha256=bundle.sha256_of(path).sha256, id=path.stem)
    request = RunRequest(
        recipe=Recipe(training_file=path.stem, max_length=LENGTH, **recipe),
        training=file,
        validation=None,
        folder=folder / f"run-{name}",
        repository=folder / "repository",
        name=name,
        job_id=name,
    )
    return run(request, Quiet())


def accuracy(folder: Path, manifest: Manifest, kept: list[Sentence]) -> float:
    """Of the exported graph on the held-out sentences."""
    place = folder / "repository" / manifest.name / str(manifest.version)
    assert isinstance(manifest.input, TextInput)
    texts = TextProcessor(manifest.input, (place / manifest.input.tokenizer).read_bytes())
    session = onnxruntime.InferenceSession(str(place / "model.onnx"), providers=["CPUExecutionProvider"])
    right = 0
    for start in range(0, len(kept), 64):
        part = kept[start : start + 64]
        ids, mask = pad(texts.encode([text for text, _ in part]), manifest.input.pad_token_id, LENGTH)
        winners = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0].argmax(1)
        right += sum(manifest.labels[winner] == language for winner, (_, language) in zip(winners, part, strict=True))
    return right / len(kept)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path, kept = languages(folder)
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        print(f"{len(rows):,} sentences to train on, {len(kept):,} held out, {len(LANGUAGES)} languages")
        model = ModelSpec(architecture="transformer_encoder", hyperparameters=SIZES)
        masked = job(
            folder,
            "masked",
            [{"text": row["text"]} for row in rows],
            model=model,
            objective=MaskedTokens(),
            seed=1,
            hyperparameters=Hyperparameters(n_epochs=MASKED_EPOCHS, learning_rate=MASKED_RATE),
        )
        print(
            f"masked: perplexity {masked.metrics['perplexity']:.1f}, unigram {masked.metrics['unigram_perplexity']:.1f}"
        )
        by_language: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
        for row in rows:
            by_language[row["label"]].append(row)
        for labelled in LABELLED:
            found: dict[str, list[float]] = {"scratch": [], "masked": []}
            for seed in SEEDS:
                random = np.random.default_rng(seed)
                few = [
                    members[i] for members in by_language.values() for i in random.permutation(len(members))[:labelled]
                ]
                for start, begin in (("scratch", model), ("masked", "masked")):
                    manifest = job(
                        folder,
                        f"{start}-{labelled}-{seed}",
                        few,
                        model=begin,
                        objective=CrossEntropy(),
                        seed=seed,
                        data=Data(validation=0.25),
                    )
                    found[start].append(accuracy(folder, manifest, kept))
            shown = ", ".join(
                f"{start} {np.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"
                for start, values in found.items()
            )
            print(f"{labelled} labelled sentences a language: accuracy {shown}", flush=True)


if __name__ == "__main__":
    main()
