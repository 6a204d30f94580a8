"""From a trained network to a published bundle: graph, parity, weights, report, card, one rename."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np

from export import model_card, parity
from export.bundle import (
    CHAT_TEMPLATE,
    Generation,
    GraphSpec,
    Head,
    Interval,
    Lineage,
    Manifest,
    Precision,
    Provider,
    Variant,
)
from export.onnx import export_onnx
from export.processing.inputs import DataInput, ImageInput, InputSpec, LatentInput, TextInput
from export.publish import publish
from export.quantize import Quantization, quantize_judged
from export.reports.evaluation import Evaluation
from export.staging import staging
from export.variants import Optimization, Report, add_variants
from models import registry
from models.catalog import BACKBONES
from models.network import Network, complete
from models.spec import MultiTask, tag

PACKAGES = ("torch", "transformers", "onnx", "onnxscript")


def bundle(
    network: Network,
    *,
    name: str,
    repository: Path,
    input: DataInput,
    labels: Sequence[str],
    heads: Mapping[str, list[str]] | None = None,
    intervals: Mapping[str, Interval] | None = None,
    tokenizer: bytes | None,
    output_text: TextInput | None = None,
    output_tokenizer: bytes | None = None,
    generation: Generation | None = None,
    chat_template: str | None = None,
    quantization: Quantization | None = None,
    optimization: Optimization | None = None,
    validation: Iterable[Mapping[str, np.ndarray]],
    metrics: Mapping[str, float],
    evaluation: Evaluation | None,
    lineage: Lineage,
    extra_files: Mapping[str, bytes | Path] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Publish `network` as the next version of `name`; the manifest as published.

    input: how the network's own inputs are read. labels: one for each logit or value, none for an embedding. heads:
    labels of each of several heads. intervals: of numbers, by the name of the head, "" where there is only one.
    tokenizer: tokenizer.json, for texts. output_text, output_tokenizer: of the texts that are written. generation,
    chat_template: of a language model; the template itself, as `export.bundle.CHAT_TEMPLATE` holds it. quantization: of
    a language model's graph, once it has been compared; optimization: of every other's. validation: batches of the
    network's inputs that PyTorch and ONNX Runtime are compared on. extra_files: more files by name. progress: told of
    each stage in a sentence. Raises ParityError or TooMuchLost, and then nothing is published.
    """
    task = complete(network.spec)
    several = task.heads if isinstance(task, MultiTask) else {}
    known = intervals or {}
    batches = iter(validation)
    first = next(batches, None)
    if first is None:
        raise parity.ParityError("there are no samples to compare PyTorch and ONNX Runtime on")
    with staging(repository) as folder:
        progress("exporting to ONNX")
        graphs = export_onnx(network, folder, first)
        main = graphs.pop("model")
        progress("comparing PyTorch and ONNX Runtime")
        found = parity.check(network, folder, chain([first], batches))
        progress(f"PyTorch and ONNX Runtime agree on {found.samples} samples to {found.largest_difference:.1e}")
        if quantization is not None:
            assert generation is not None, "only a language model is quantized"
            metrics = {**metrics, **quantize_judged(folder / "model.onnx", quantization, progress)}
            generation = msgspec.structs.replace(generation, weights=quantization.weights)
        variants: list[Variant] = []
        serving: dict[Provider, Precision] = {}
        tried: Report | None = None
        if optimization is not None:
            variants, serving, tried = add_variants(folder, optimization, progress)
            (folder / "optimization.json").write_bytes(msgspec.json.format(msgspec.json.encode(tried)))
        registry.save(network, folder)
        if isinstance(input, TextInput):
            assert tokenizer is not None, "a text model needs its tokenizer"
            (folder / input.tokenizer).write_bytes(tokenizer)
        if output_text is not None:
            assert output_tokenizer is not None, "a text model needs its tokenizer"
            (folder / output_text.tokenizer).write_bytes(output_tokenizer)
        if generation is not None and isinstance(input, TextInput):
            # It learns from shorter pieces than it can read.
            input = msgspec.structs.replace(input, max_length=generation.context)
        if generation is not None and chat_template is not None:
            (folder / CHAT_TEMPLATE).write_text(chat_template)
            generation = msgspec.structs.replace(generation, chat_template=CHAT_TEMPLATE)
        if evaluation is not None:
            (folder / "evaluation.json").write_bytes(msgspec.json.format(msgspec.json.encode(evaluation)))
            evaluation.plot(folder / "evaluation.png")
        for file, content in (extra_files or {}).items():
            (folder / file).parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, folder / file)
            else:
                (folder / file).write_bytes(content)
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        draft = Manifest(
            name=name,
            version=0,
            created_at=datetime.now(UTC),
            task=tag(task),
            input=served_input(main, input),
            output_text=output_text,
            generation=generation,
            inputs=main.inputs,
            outputs=main.outputs,
            graphs=graphs,
            variants=variants,
            serving=serving,
            labels=list(labels),
            interval=known.get(""),
            heads={
                name: Head(task=tag(one), labels=(heads or {})[name], interval=known.get(name))
                for name, one in several.items()
            },
            model=msgspec.to_builtins(network.spec),
            metrics=dict(metrics),
            parity=found,
            lineage=msgspec.structs.replace(lineage, package_versions={**versions, **lineage.package_versions}),
            files={},
        )
        base = BACKBONES.get(network.spec.weights or "")
        licence = base.licence if base else None
        (folder / "MODEL_CARD.md").write_text(model_card.card(draft, evaluation, licence, tried))
        manifest = publish(folder, repository, draft)
    progress(f"published as {manifest.name} version {manifest.version}")
    return manifest


def served_input(main: GraphSpec, learned: DataInput) -> InputSpec:
    """What model.onnx takes: what the network learned from, or noise."""
    size = main.inputs[0].shape[-1]
    if main.inputs[0].name == "latent" and isinstance(learned, ImageInput) and isinstance(size, int):
        return LatentInput(size=size, images=learned)
    return learned
