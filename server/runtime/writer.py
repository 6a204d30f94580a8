"""What a bundle that writes texts is made of: a translation model or a language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.bundle import DamagedBundle, GraphSpec, Manifest
from export.processing.text import TextProcessor
from server.runtime.decoding import Encoder, Prompt, StepDecoder
from server.runtime.search import Options
from server.runtime.session import Session
from server.settings import Settings

TASKS = ("translation", "language_model")


@dataclass(frozen=True)
class Writer:
    """source, target: the texts that are read and written, the same ones of a language model. goes_on: whether what
    is written is the continuation of what is read."""

    decoder: StepDecoder
    source: TextProcessor
    target: TextProcessor
    goes_on: bool

    def warm_up(self) -> None:
        """Two steps, from a single token."""
        self.decoder.decode([Prompt([self.decoder.begin], Options(max_tokens=2))])


def writer(folder: Path, manifest: Manifest, model: Session, source: TextProcessor, settings: Settings) -> Writer:
    """model: the session of model.onnx. Raises DamagedBundle for graphs that do not fit together or a tokenizer that is
    missing, and what a session raises."""
    try:
        if manifest.task == "language_model":
            return _language_model(manifest, model, source)
        return _translation(folder, manifest, model, source, settings)
    except (OSError, ValueError) as error:
        raise DamagedBundle(f"{folder}: {error}") from error


def _language_model(manifest: Manifest, model: Session, source: TextProcessor) -> Writer:
    graph = GraphSpec(inputs=manifest.inputs, outputs=manifest.outputs)
    return Writer(_decoder(None, model, graph, source, manifest), source, source, goes_on=True)


def _translation(folder: Path, manifest: Manifest, model: Session, source: TextProcessor, settings: Settings) -> Writer:
    spec, graph = manifest.output_text, manifest.graphs.get("decoder")
    if spec is None or graph is None:
        raise ValueError("a translation has a decoder.onnx and an output_text; the manifest describes none")
    target = TextProcessor(spec, (folder / spec.tokenizer).read_bytes())
    encoder = Encoder(model, manifest.outputs, source.spec.pad_token_id, source.spec.max_length)
    step = Session(folder / "decoder.onnx", settings.providers, settings.parallel_runs, settings.intra_op_threads)
    return Writer(_decoder(encoder, step, graph, target, manifest), source, target, goes_on=False)


def _decoder(
    encoder: Encoder | None, step: Session, graph: GraphSpec, target: TextProcessor, manifest: Manifest
) -> StepDecoder:
    end = target.spec.eos_token_id
    begin = end if target.spec.bos_token_id is None else target.spec.bos_token_id
    if begin is None or end is None:
        raise ValueError("the texts that are written need an eos_token_id")
    return StepDecoder(
        encoder,
        step,
        graph.inputs,
        graph.outputs,
        begin=begin,
        end=end,
        text=target.decode,
        max_sequences=manifest.batching.max_batch_size,
    )
