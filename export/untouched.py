"""A backbone published as it is, without training: ImageNet classes or an encoder's embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np

from export.bundle import Lineage, Manifest
from export.bundling import bundle
from export.processing.inputs import ImageInput, InputSpec, TextInput
from export.processing.text import TextProcessor, pad
from models import catalog, registry
from models.backbones import weights
from models.spec import Classification, Embedding

SAMPLES = 16


def export_backbone(
    model: str,
    *,
    name: str | None,
    repository: Path,
    backbones: Mapping[str, str],
    progress: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Publish the backbone `model` under `name` (its own name when None).

    EfficientNet-Lite0 answers the 1,000 classes of ImageNet, every other backbone its feature vector. Raises
    ValueError when there is no such backbone, ParityError when the graph does not agree with PyTorch.
    """
    spec = weights.spec_for(model, backbones)
    if spec.weights is None:
        raise ValueError(f"{model} is an architecture without weights; name a backbone, a folder or a hub id")
    imagenet = catalog.BACKBONES[model].classes_package if model in catalog.BACKBONES else None
    labels = weights.imagenet_labels() if imagenet else []
    network = registry.build(msgspec.structs.replace(spec, task=Classification(len(labels)) if labels else Embedding()))
    weights.load(network, model, backbones)
    parameters = catalog.hyperparameters(spec)
    tokenizer: bytes | None = None
    input: InputSpec
    if isinstance(parameters, catalog.TextEncoderParameters):
        tokenizer, padding = weights.tokenizer_json(model, backbones)
        input = TextInput(max_length=parameters.max_length, pad_token_id=padding)
        samples = _texts(TextProcessor(input, tokenizer), padding)
    else:
        assert isinstance(parameters, catalog.EfficientNetLiteParameters | catalog.ImageEncoderParameters)
        input = ImageInput(height=parameters.image_size, width=parameters.image_size)
        samples = _images(parameters.image_size)
    return bundle(
        network,
        name=name or Path(model).name,
        repository=repository,
        input=input,
        labels=labels,
        tokenizer=tokenizer,
        validation=samples,
        metrics={},
        evaluation=None,
        lineage=Lineage(base_model=model),
        progress=progress,
    )


def _images(size: int) -> Iterator[dict[str, np.ndarray]]:
    """Smooth random images: noise at a tenth of the size, enlarged, so that the filters have edges to see."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (SAMPLES, size // 10 + 1, size // 10 + 1, 3), dtype=np.uint8)
    pixels = coarse.repeat(10, axis=1).repeat(10, axis=2)[:, :size, :size]
    yield {"pixels": np.ascontiguousarray(pixels)}


def _texts(processor: TextProcessor, padding: int) -> Iterator[dict[str, np.ndarray]]:
    """Random words of the tokenizer's own vocabulary, in texts of 1 to 60 words."""
    random = np.random.default_rng(0)
    vocabulary = sorted(processor.tokenizer.get_vocab())
    texts = [" ".join(random.choice(vocabulary, random.integers(1, 60))) for _ in range(SAMPLES)]
    ids, mask = pad(processor.encode(texts), padding, processor.spec.max_length)
    yield {"input_ids": ids, "attention_mask": mask}
