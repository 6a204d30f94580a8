"""A language model as a bundle: what a server must know to write with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from export import bundle
from export.bundle import CHAT_TEMPLATE, Generation, Lineage
from export.bundling import bundle as make_bundle
from export.processing.inputs import TextInput
from finetune.vocabulary import BOS, EOS, PAD, train_tokenizer
from models import registry
from models.spec import LanguageModel, ModelSpec
from tests.models.narrow import TRANSFORMER

TEMPLATE = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


def test_its_context_its_ends_and_its_chat_template_are_in_the_manifest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocabulary": 300, "max_length": 32, **TRANSFORMER}
    network = registry.build(ModelSpec(architecture="transformer_decoder", hyperparameters=sizes, task=LanguageModel()))
    ids = np.random.default_rng(0).integers(5, 300, (4, 12))
    made = make_bundle(
        network,
        name="tales",
        repository=tmp_path,
        input=TextInput(max_length=32, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS),
        labels=[],
        tokenizer=train_tokenizer([], 300),
        generation=Generation(context=32, end_token_ids=[EOS, PAD]),
        chat_template=TEMPLATE,
        validation=[{"input_ids": ids, "attention_mask": np.ones_like(ids)}],
        metrics={},
        evaluation=None,
        lineage=Lineage(base_model="transformer_decoder"),
    )
    assert made.generation == Generation(context=32, end_token_ids=[EOS, PAD], chat_template=CHAT_TEMPLATE)
    folder = tmp_path / "tales" / "1"
    assert bundle.verify(folder) == made
    assert (folder / CHAT_TEMPLATE).read_text() == TEMPLATE
