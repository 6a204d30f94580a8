"""The networks that every server has, and one input of each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal

import msgspec
import numpy as np

Form = Literal["json", "binary"]

VECTOR, IMAGE, WIDTH = 784, 224, 384
SEED = 0


class Case(msgspec.Struct, frozen=True):
    """A request. model: its name in the repository. form: whether numbers are text or bytes. tokens: of a text; else 0.
    A text is token ids in whatever form its server answers sooner. words: for the reader."""

    name: str
    model: str
    form: Form
    words: str
    tokens: int = 0


CASES = (
    Case("mlp-json", "mlp", "json", "MLP, JSON"),
    Case("mlp-binary", "mlp", "binary", "MLP, binary"),
    Case("cnn", "efficientnet-lite0", "binary", "EfficientNet-Lite0, uint8 pixels"),
    Case("text-32", "minilm-l6-v2", "json", "MiniLM, 32 tokens", 32),
    Case("text-128", "minilm-l6-v2", "json", "MiniLM, 128 tokens", 128),
)
MODELS = tuple(dict.fromkeys(case.model for case in CASES))


def sample(case: Case, rows: int = 1) -> dict[str, np.ndarray]:
    """What the graph takes, by its names: "vector" float32 [rows, 784], "pixels" uint8 [rows, 224, 224, 3], or
    "input_ids" and "attention_mask" int64 [rows, tokens]."""
    random = np.random.default_rng(SEED)
    if case.model == "mlp":
        # Four digits, so that text and bytes say the same.
        return {"vector": random.integers(0, 10_000, (rows, VECTOR)).astype(np.float32) / np.float32(10_000)}
    if case.model == "efficientnet-lite0":
        return {"pixels": random.integers(0, 256, (rows, IMAGE, IMAGE, 3), dtype=np.uint8)}
    ids = random.integers(1_000, 30_000, (rows, case.tokens), dtype=np.int64)
    ids[:, 0], ids[:, -1] = 101, 102  # its first and last tokens
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def output(case: Case) -> str:
    """Of the graph: "logits" float32 [rows, classes], or "embedding" float32 [rows, 384]."""
    return "embedding" if case.tokens else "logits"


def graph(repository: Path, model: str) -> Path:
    return repository / model / "1" / "model.onnx"


def publish(repository: Path, models: Sequence[str], progress: Callable[[str], None]) -> None:
    """Those of the models that are missing. Needs the packages of `espalier export`; raises what it raises."""
    for model in models:
        if not graph(repository, model).exists():
            progress(f"exporting {model}")
            repository.mkdir(parents=True, exist_ok=True)
            apart = Path(mkdtemp(dir=repository.parent))
            try:
                _mlp(apart) if model == "mlp" else _backbone(model, apart)
                shutil.rmtree(repository / model, ignore_errors=True)
                (apart / model).rename(repository / model)
            finally:
                shutil.rmtree(apart)


def _backbone(model: str, repository: Path) -> None:
    from export.untouched import export_backbone

    export_backbone(model, name=model, repository=repository, backbones={})


def _mlp(repository: Path) -> None:
    """784-512-512-10. Weights are random: they do not change the speed."""
    import torch

    from export.bundle import Lineage
    from export.bundling import bundle
    from export.processing.inputs import VectorInput
    from models import registry
    from models.spec import Classification, ModelSpec

    torch.manual_seed(SEED)
    hyperparameters = {"features": VECTOR, "hidden": [512, 512]}
    spec = ModelSpec(architecture="mlp", hyperparameters=hyperparameters, task=Classification(10))
    bundle(
        registry.build(spec),
        name="mlp",
        repository=repository,
        input=VectorInput(features=VECTOR),
        labels=[str(digit) for digit in range(10)],
        tokenizer=None,
        validation=[sample(CASES[0], 4)],
        metrics={},
        evaluation=None,
        lineage=Lineage(base_model=spec.architecture),
    )
