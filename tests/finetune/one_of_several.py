"""A training run, alone or as one process of several (`python -m torch.distributed.run`)."""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file

from finetune.automatic import Chosen
from finetune.recipe import Sgd, Transfer
from models.network import Network
from tests.finetune.small import digit_vectors, fit, mlp


def train(folder: Path) -> Network:
    network = mlp()
    fit(
        network,
        digit_vectors(250),
        folder / "checkpoints",
        chosen=Chosen(epochs=2, batch_size=16, learning_rate=0.2),
        optimizer=Sgd(),
        transfer=Transfer(freeze="hidden.0", unfreeze_epoch=1),
        gradient_accumulation=2,
    )
    return network


if __name__ == "__main__":
    trained = train(Path(sys.argv[1]))
    process = PartialState()
    save_file(
        trained.state_dict(), Path(sys.argv[1]) / f"{process.process_index}-of-{process.num_processes}.safetensors"
    )
    process.destroy_process_group()
