"""A backbone published as it is, without training: ImageNet classes, an encoder's embeddings, or a language model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from export.bundle import Generation, Lineage, Manifest
from export.bundling import bundle
from export.perplexity import some
from export.processing.inputs import ImageInput, InputSpec, TextInput
from export.processing.text import TextProcessor, pad
from export.quantize import Quantization
from models import catalog, registry
from models.backbones import weights
from models.backbones.language import Language
from models.network import Network
from models.spec import Classification, Embedding, LanguageModel, ModelSpec

SAMPLES = 16
# Modules of Python's library whose documentation is English text that is there on every machine.
PROSE = ("argparse", "calendar", "collections", "concurrent.futures", "csv", "decimal", "difflib", "doctest",
         "fractions", "gettext", "heapq", "json", "logging", "optparse", "pickle", "random", "shlex", "statistics",
         "string", "subprocess", "textwrap", "threading", "urllib.parse", "zipfile")  # fmt: skip
# Characters.
PAGE = 2_000
# Tokens of each text that PyTorch and ONNX Runtime are compared on, and of all that quantized weights are judged on.
COMPARED, JUDGED = 128, 8192

Weights = Literal["float32", "float16", "int8", "int4"]


def export_backbone(
    model: str,
    *,
    name: str | None,
    repository: Path,
    backbones: Mapping[str, str],
    kept_as: Weights = "float32",
    most_loss: float = 0.02,
    held_out: Callable[[Language], Sequence[str]] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Publish the backbone `model` under `name` (its own name when None).

    EfficientNet-Lite0 answers the 1,000 classes of ImageNet, a decoder the next token, every other backbone its feature
    vector. kept_as: what the matrices of a decoder become, judged by the perplexity on texts that are `held_out`, which
    may rise by the share `most_loss`; None: half of the documentation of Python's library. Raises ValueError when
    there is no such backbone, or too much is lost, ParityError when the graph does not agree with PyTorch.
    """
    spec = weights.spec_for(model, backbones)
    if spec.weights is None:
        raise ValueError(f"{model} is an architecture without weights; name a backbone, a folder or a hub id")
    if spec.architecture == "causal_decoder":
        return _export_decoder(
            spec,
            name=name or Path(model).name.removesuffix(".gguf"),
            repository=repository,
            backbones=backbones,
            kept_as=kept_as,
            most_loss=most_loss,
            held_out=held_out,
            progress=progress,
        )
    if kept_as != "float32":
        raise ValueError(f"weights: {kept_as} is for language models, and {model} is none")
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


def _export_decoder(
    spec: ModelSpec,
    *,
    name: str,
    repository: Path,
    backbones: Mapping[str, str],
    kept_as: Weights,
    most_loss: float,
    held_out: Callable[[Language], Sequence[str]] | None,
    progress: Callable[[str], None],
) -> Manifest:
    assert spec.weights is not None
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.CausalDecoderParameters)
    context = parameters.max_length
    assert context is not None, "a complete spec has it"
    language = weights.language_of(spec.weights, backbones)
    input = TextInput(
        max_length=context,
        pad_token_id=language.padding,
        bos_token_id=language.beginning,
        eos_token_id=language.ends[0],
    )
    processor = TextProcessor(input, language.tokenizer)
    quantization = None
    if kept_as != "float32":
        usual, texts = prose()[::2], held_out(language) if held_out else prose()[1::2]
        tokens = [list(some(map(np.array, processor.encode(one)), JUDGED)) for one in (texts, usual)]
        quantization = Quantization(kept_as, most_loss, *tokens)
    progress("loading the weights")
    network: Network = registry.build(msgspec.structs.replace(spec, task=LanguageModel()))
    weights.load(network, spec.weights, backbones)
    ids, mask = pad([row[:COMPARED] for row in processor.encode(prose()[:SAMPLES])], input.pad_token_id, context)
    return bundle(
        network,
        name=name,
        repository=repository,
        input=input,
        labels=[],
        tokenizer=language.tokenizer,
        generation=Generation(context=context, end_token_ids=list(language.ends)),
        chat_template=language.chat_template,
        quantization=quantization,
        validation=[{"input_ids": ids, "attention_mask": mask}],
        metrics={},
        evaluation=None,
        lineage=Lineage(base_model=spec.weights),
        progress=progress,
    )


def prose() -> list[str]:
    """What the modules of Python's library, and their classes, say of themselves: about a page each."""
    found = []
    for name in PROSE:
        module = importlib.import_module(name)
        parts = [module, *(part for part in vars(module).values() if inspect.isclass(part) and part.__module__ == name)]
        found.append("\n\n".join(text for part in parts if (text := inspect.getdoc(part))))
    return [text[:PAGE] for text in found if len(text) >= PAGE // 5]


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
