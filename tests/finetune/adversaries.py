"""A small game to train: digits of 16 pixels, and a run of it, alone or as one process of several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from finetune import recipe, trainer
from finetune.automatic import Chosen
from finetune.objectives.adversarial import Adversarial
from finetune.preprocess import Items
from models import registry
from models.gan import Gan
from models.spec import Generation, ModelSpec
from tests.finetune.small import Recorder

SIZE = 16
HELD_OUT = 60
USUAL = recipe.Adversarial()


def digit(image: np.ndarray) -> Image.Image:
    """One of scikit-learn's digits, 8 × 8 numbers up to 16, as a picture."""
    return Image.fromarray((image * 15.9).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def digits(items: int = 300) -> Items:
    pixels = np.stack([np.asarray(digit(image).convert("RGB")) for image in load_digits().images[:items]])
    return Items(np.zeros(items, np.int64), None, np.arange(items), lambda rows: {"pixels": pixels[rows]})


def gan(items: Items, seed: int = 0, **hyperparameters: Any) -> Gan:
    torch.manual_seed(seed)
    given = {"image_size": SIZE, "width": 8, "latent": 8, **hyperparameters}
    network = registry.build(ModelSpec(architecture="gan", hyperparameters=given, task=Generation()))
    network.measure(lambda: [torch.from_numpy(items.batch(np.arange(len(items)))["pixels"])], torch.zeros(len(items)))
    assert isinstance(network, Gan)
    return network


def play(
    network: Gan,
    items: Items,
    folder: Path,
    reporter: Recorder | None = None,
    *,
    chosen: Chosen,
    section: recipe.Adversarial = USUAL,
    **fields: Any,
) -> trainer.FitResult:
    """trainer.fit with the last items for validation; `fields` of the Recipe."""
    torch.set_num_threads(1)
    cut = len(items) - HELD_OUT
    return trainer.fit(
        network,
        items.select(np.arange(cut)),
        items.select(np.arange(cut, len(items))),
        Adversarial(section),
        recipe.Recipe(model="gan", training_file="digits", **{"checkpoint_seconds": 1e9, **fields}),
        chosen,
        seed=0,
        run="run",
        folder=folder,
        reporter=reporter or Recorder(),
    )


if __name__ == "__main__":
    data = digits(140)
    trained = gan(data)
    play(trained, data, Path(sys.argv[1]) / "checkpoints", chosen=Chosen(epochs=3, batch_size=16, learning_rate=1e-3))
    process = PartialState()
    save_file(
        {name: tensor.contiguous() for name, tensor in trained.state_dict().items()},
        Path(sys.argv[1]) / f"{process.process_index}-of-{process.num_processes}.safetensors",
    )
    process.destroy_process_group()
