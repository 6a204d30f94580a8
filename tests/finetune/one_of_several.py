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


def threads() -> list[str]:
    """Names of all threads of this process, those of libraries, too."""
    return [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


if __name__ == "__main__":
    trained = train(Path(sys.argv[1]))
    process = PartialState()
    save_file(
        trained.state_dict(), Path(sys.argv[1]) / f"{process.process_index}-of-{process.num_processes}.safetensors"
    )
    process.destroy_process_group()
    left = [thread for thread in threads() if thread.startswith("pt_gloo")]
    assert not left, f"{left}: something holds the process group, whose threads may abort the process when it ends"
