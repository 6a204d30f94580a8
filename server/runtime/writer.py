"""What a bundle that translates texts is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.bundle import DamagedBundle, Manifest
from export.processing.text import TextProcessor
from server.runtime.decoding import Encoder, Prompt, StepDecoder
from server.runtime.placement import Placement
from server.runtime.search import Options
from server.runtime.session import Session

TASK = "translation"


@dataclass(frozen=True)
class Writer:
    """source, target: the texts that are read and written."""

    decoder: StepDecoder
    source: TextProcessor
    target: TextProcessor

    def warm_up(self) -> None:
        """Two steps, from a single token."""
        self.decoder.decode([Prompt([self.decoder.begin], Options(max_tokens=2))])


def writer(folder: Path, manifest: Manifest, model: Session, source: TextProcessor, placed: Placement) -> Writer:
    """model: the session of model.onnx. Raises DamagedBundle for graphs that do not fit together or a tokenizer that is
    missing, and what a session raises."""
    try:
        return _translation(folder, manifest, model, source, placed)
    except (OSError, ValueError) as error:
        raise DamagedBundle(f"{folder}: {error}") from error


def _translation(folder: Path, manifest: Manifest, model: Session, source: TextProcessor, placed: Placement) -> Writer:
    spec, graph = manifest.output_text, manifest.graphs.get("decoder")
    if spec is None or graph is None:
        raise ValueError("a translation has a decoder.onnx and an output_text; the manifest describes none")
    target = TextProcessor(spec, (folder / spec.tokenizer).read_bytes())
    end = spec.eos_token_id
    begin = end if spec.bos_token_id is None else spec.bos_token_id
    if begin is None or end is None:
        raise ValueError("the texts that are written need an eos_token_id")
    encoder = Encoder(model, manifest.outputs, source.spec.pad_token_id, source.spec.max_length)
    step = Session(folder / "decoder.onnx", placed)
    decoder = StepDecoder(
        encoder,
        step,
        graph.inputs,
        graph.outputs,
        begin=begin,
        end=end,
        text=target.decode,
        max_sequences=manifest.batching.max_batch_size,
    )
    return Writer(decoder, source, target)
