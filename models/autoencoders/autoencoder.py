"""Autoencoder (Rumelhart, Hinton and Williams 1986): an input, its code, and the input again.

Without hidden layers and with a linear code it spans the subspace of the first principal components (Baldi and Hornik
1989); deep: Hinton and Salakhutdinov 2006; with convolutions: Masci et al. 2011. What it learns by (corrupted inputs,
sparse codes, contraction) is the objective's. Asked for a supervised task, it is the encoder with a head.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from models import catalog
from models.autoencoders.coding import IMAGE_CODE, Decoder, Encoder, channels, units
from models.network import Headed, Network, complete
from models.spec import ModelSpec, Reconstruction


class Autoencoder(Network):
    """The encoder is the trunk, as that of a network with a head, which can go on from its weights."""

    output_names = ("reconstruction", "error", "embedding")

    def __init__(self, spec: ModelSpec, trunk: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.spec = spec
        self.trunk = trunk
        self.decoder = decoder
        self.input_names = trunk.input_names

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [*self.trunk.blocks(), *self.decoder.blocks()]

    def measure(self, inputs: Callable[[], list[Tensor]], targets: Tensor) -> None:
        self.trunk.measure(inputs)

    def forward(self, raw: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """raw: a batch of inputs. change: made to them, in their units, before they are encoded; what they are
        compared with stays as it is.

        `reconstruction` as the input, uint8 for pixels; `error` float32 [batch], the mean squared error in the inputs'
        units; `embedding` float32 [batch, code]. `clean` and `changed`: the inputs in their units.
        """
        clean = self.trunk.units(raw)
        changed = clean if change is None else change(clean)
        code = self.trunk.encode(changed)
        decoded = self.decoder(code)
        return {
            "reconstruction": self.trunk.units.back(decoded),
            "error": (decoded - clean).square().flatten(1).mean(dim=1),
            "embedding": code,
            "clean": clean,
            "changed": changed,
        }


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when what the network reads is still open."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.AutoencoderParameters)
    read, stages = units(spec.architecture, parameters), channels(spec.architecture, parameters)
    code = parameters.code or (max(1, read.shape[0] // 2) if len(read.shape) == 1 else IMAGE_CODE)
    trunk = Encoder(read, stages, parameters.hidden, code, parameters.activation, parameters.code_activation)
    if not isinstance(complete(spec), Reconstruction):
        return Headed(spec, trunk, parameters.dropout)
    return Autoencoder(spec, trunk, Decoder(read.shape, stages, parameters.hidden, code, parameters.activation))
