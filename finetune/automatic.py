"""The rules behind every "auto" of a recipe. Pure functions of the data's size and of what is trained.

batch size      the largest power of two that leaves 20 steps in an epoch, at least 8 and at most 32 for images,
                texts and series, 256 for vectors.
optimizer       AdamW; for an adversarial game Adam with a beta1 of 0.5 (Radford et al. 2016).
learning rate   at a batch of 32 with AdamW: 5e-5 for a pre-trained text encoder, 1e-4 for a pre-trained causal decoder,
                5e-4 for a pre-trained image trunk or any network that was trained here from random weights, 1e-3 for
                random weights, 5e-3 when only the head ever learns. Adam and RMSProp alike
                (with momentum α RMSProp takes 1 - α of it), AdaGrad 10 times as much, SGD 20 times.
                Other batches: times the square root of batch / 32 (Malladi et al. 2022), SGD times batch / 32
                (Goyal et al. 2017). All of it times the recipe's multiplier.
                An adapter has 5e-4, ten times what its trunk would have (Schulman et al. 2025, "LoRA Without Regret").
                An adversarial game has 2e-4 (Radford et al. 2016) in the place of 1e-3, a seq2seq network 4e-3.
epochs          enough for 1,000 steps on pre-trained weights, 3,000 from random ones, 10,000 for a translation; at
                least 2 and at most 100, 10 for pre-trained trunks, which are large and know much, 4 for causal
                decoders, which learn texts by heart after that; 6,000 and 300 for an adversarial game, of whose steps
                each teaches one player; never so many that there are more than 30,000 steps, unless one epoch has them.
precision       bfloat16 where a CUDA device computes in it, float16 on older ones, float32 elsewhere. (A CPU with
                instructions for bfloat16 trains 1.5 times as fast in it, and ended a little worse in two runs of two.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from finetune.recipe import AdaGrad, Adam, AdamW, Optimizer, Recipe, RmsProp, Sgd
from models.catalog import Modality

# Where weights begin: as random numbers, as what was learned here from random numbers, as a pre-trained trunk.
Beginning = Literal["random", "learned", "backbone"]

LARGEST_BATCH: dict[Modality, int] = {"image": 32, "text": 32, "vector": 256, "series": 32}
SMALLEST_BATCH = 8
STEPS_AN_EPOCH = 20

BACKBONE_RATE: dict[Modality, float] = {"image": 5e-4, "text": 5e-5, "vector": 5e-4, "series": 5e-4}
DECODER_RATE = 1e-4
LEARNED_RATE = 5e-4
SCRATCH_RATE = 1e-3
SEQ2SEQ_RATE = 4e-3
HEAD_RATE = 5e-3
LORA_RATE = 5e-4
ADVERSARIAL_RATE = 2e-4
SGD_FACTOR = 20.0
ADAGRAD_FACTOR = 10.0
REFERENCE_BATCH = 32
USUAL_OPTIMIZER = AdamW()
ADVERSARIAL_OPTIMIZER = Adam(beta1=0.5)

TRANSLATORS = ("seq2seq", "transformer")
# Steps that are enough, and the most epochs.
STEPS: dict[Beginning, tuple[int, int]] = {"random": (3_000, 100), "learned": (1_000, 100), "backbone": (1_000, 10)}
TRANSLATION_STEPS = (10_000, 100)
DECODER = "causal_decoder"
DECODER_STEPS = (1_000, 4)
ADVERSARIAL_STEPS = (6_000, 300)
MOST_STEPS = 30_000

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What "auto" became. `batch_size` is what one forward pass sees; a step sees `gradient_accumulation` of them.
    `optimizer` is for a recipe that leaves it open."""

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: Optimizer = USUAL_OPTIMIZER


def batch_size(modality: Modality, items: int) -> int:
    """Items in one forward pass, for `items` training items."""
    wanted = 1 << int(math.log2(max(items / STEPS_AN_EPOCH, 1.0)))
    return max(SMALLEST_BATCH, min(LARGEST_BATCH[modality], wanted))


def learning_rate(
    modality: Modality,
    optimizer: Literal["adamw", "sgd"],
    *,
    step_items: int,
    beginning: Beginning,
    head_only: bool,
    lora: bool = False,
    adversarial: bool = False,
    scratch: float = SCRATCH_RATE,
    backbone: float | None = None,
) -> float:
    """Peak learning rate for steps of `step_items` items. scratch: from random weights; backbone: from those of a
    backbone."""
    if adversarial:
        rate = ADVERSARIAL_RATE
    elif head_only:
        rate = HEAD_RATE
    elif lora:
        rate = LORA_RATE
    else:
        rate = {"random": scratch, "learned": LEARNED_RATE, "backbone": backbone or BACKBONE_RATE[modality]}[beginning]
    ratio = step_items / REFERENCE_BATCH
    return rate * math.sqrt(ratio) if optimizer == "adamw" else rate * SGD_FACTOR * ratio


def epochs(
    items: int,
    step_items: int,
    *,
    beginning: Beginning,
    adversarial: bool = False,
    translation: bool = False,
    decoder: bool = False,
) -> int:
    """Passes over `items` training items in steps of `step_items`."""
    steps = math.ceil(items / step_items)
    wanted, most = ADVERSARIAL_STEPS if adversarial else STEPS[beginning]
    if translation and beginning == "random":
        wanted, most = TRANSLATION_STEPS
    if decoder and beginning == "backbone":
        wanted, most = DECODER_STEPS
    passes = min(max(math.ceil(wanted / steps), 2), most)
    return max(1, min(passes, MOST_STEPS // steps))


def choose(
    recipe: Recipe,
    modality: Modality,
    items: int,
    *,
    beginning: Beginning,
    adversarial: bool = False,
    architecture: str | None = None,
) -> Chosen:
    """Every hyper-parameter as a number, for `items` training items. architecture: for those with rules of their own.

    Raises ValueError when the recipe gives both a learning rate and a multiplier of the automatic one.
    """
    given = recipe.training_hyperparameters()
    if given.learning_rate != "auto" and given.learning_rate_multiplier != "auto":
        raise ValueError(
            "hyperparameters: learning_rate is absolute, learning_rate_multiplier scales the automatic "
            "rate; give one of them"
        )
    size = batch_size(modality, items) if given.batch_size == "auto" else given.batch_size
    step_items = min(size * recipe.gradient_accumulation, items)
    rate = given.learning_rate
    if rate == "auto":
        optimizer: Literal["adamw", "sgd"] = "sgd" if isinstance(recipe.optimizer, Sgd) else "adamw"
        multiplier = 1.0 if given.learning_rate_multiplier == "auto" else given.learning_rate_multiplier
        rate = multiplier * learning_rate(
            modality,
            optimizer,
            step_items=step_items,
            beginning=beginning,
            head_only=recipe.transfer.head_only,
            lora=recipe.transfer.lora is not None,
            adversarial=adversarial,
            scratch=SEQ2SEQ_RATE if architecture == "seq2seq" else SCRATCH_RATE,
            backbone=DECODER_RATE if architecture == DECODER else None,
        )
        if isinstance(recipe.optimizer, RmsProp):
            rate *= 1.0 - recipe.optimizer.momentum
        elif isinstance(recipe.optimizer, AdaGrad):
            rate *= ADAGRAD_FACTOR
    passes = given.n_epochs
    if passes == "auto":
        translation = architecture in TRANSLATORS
        passes = epochs(
            items,
            step_items,
            beginning=beginning,
            adversarial=adversarial,
            translation=translation,
            decoder=architecture == DECODER,
        )
    return Chosen(
        epochs=passes,
        batch_size=size,
        learning_rate=rate,
        optimizer=ADVERSARIAL_OPTIMIZER if adversarial else USUAL_OPTIMIZER,
    )


def precision(requested: str, device: torch.device) -> Precision:
    """Accelerate's name for the precision of `requested` ("auto", "float32", "bfloat16", "float16") on `device`.
    The weights themselves are float32, whatever it is.

    Raises ValueError for float16 without CUDA: its gradients need a scaled loss, which CPUs do not have.
    """
    if requested == "auto":
        if device.type != "cuda":
            return "no"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if requested == "float16" and device.type != "cuda":
        raise ValueError(
            f"precision: float16 needs a CUDA device, this machine trains on {device.type}; "
            'use "auto", "float32" or "bfloat16"'
        )
    names: dict[str, Precision] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    return names[requested]
