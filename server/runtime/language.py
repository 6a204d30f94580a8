"""What a language model's bundle is made of, beside the engine that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.bundle import DamagedBundle, Manifest
from export.processing.chat import compiled
from export.processing.inputs import BadInput
from export.processing.text import TextProcessor
from server.runtime.grammar import Grammars
from server.runtime.slots import GraphSlots
from server.settings import Settings

TASK = "language_model"


@dataclass(frozen=True)
class LanguageModel:
    """slots: the network. ends: tokens that end a sequence. context: most tokens of one, prompt and answer. vocabulary:
    token ids are below it. template: chats are rendered by it, with the texts of the tokens bos and eos; None: it knows
    no chats. grammars: None where tokens are not made of bytes, so that no grammar can be followed."""

    slots: GraphSlots
    texts: TextProcessor
    grammars: Grammars | None
    ends: frozenset[int]
    context: int
    vocabulary: int
    template: str | None
    bos: str
    eos: str

    def warm_up(self) -> None:
        """Read a token and write one."""
        token = min(self.ends)
        self.slots.prefill(0, [token], 0, logits=True)
        self.slots.decode(np.array([token]), np.array([2], np.int32))


def language_model(folder: Path, manifest: Manifest, texts: TextProcessor, settings: Settings) -> LanguageModel:
    """Raises DamagedBundle for a bundle that lacks something, and what ONNX Runtime raises for its graph."""
    found = manifest.generation
    if found is None:
        words = (
            "a language model as Espalier once published them, whose graph takes token_mask; train or export it again"
        )
        raise DamagedBundle(f"{folder}: {words}")
    if not found.end_token_ids:
        raise DamagedBundle(f"{folder}: no end_token_ids, so that no answer would end")
    try:
        template = None
        if found.chat_template is not None:
            compiled(template := (folder / found.chat_template).read_text(encoding="utf-8"))
        slots = GraphSlots(folder / "model.onnx", settings, context=found.context)
        tokenizer = (folder / texts.spec.tokenizer).read_bytes()
        try:
            grammars = Grammars(tokenizer, slots.vocabulary, found.end_token_ids)
        except ValueError:
            grammars = None
    except (OSError, ValueError, BadInput) as error:
        raise DamagedBundle(f"{folder}: {error}") from error
    name = texts.tokenizer.id_to_token
    return LanguageModel(
        slots,
        texts,
        grammars,
        ends=frozenset(found.end_token_ids),
        context=min(slots.context, slots.tokens),
        vocabulary=min(slots.vocabulary, texts.tokenizer.get_vocab_size()),
        template=template,
        bos="" if texts.spec.bos_token_id is None else name(texts.spec.bos_token_id) or "",
        eos="" if texts.spec.eos_token_id is None else name(texts.spec.eos_token_id) or "",
    )
