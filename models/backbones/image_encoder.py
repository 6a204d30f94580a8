"""ResNet, ConvNeXt, MobileNet or ViT from transformers as a trunk."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from models import catalog
from models.backbones.blocks import blocks_of
from models.network import Network, Normalize, Trunk
from models.spec import ModelSpec


class ImageEncoder(Trunk):
    """uint8 [batch, height, width, 3] → float32 [batch, channels].

    Convolutional features are averaged over their positions; of a Vision Transformer the class token is taken.
    """

    input_names = ("pixels",)

    def __init__(self, config: dict[str, Any], parameters: catalog.ImageEncoderParameters) -> None:
        super().__init__()
        settings = AutoConfig.for_model(**config)
        self.normalize = Normalize(parameters.mean, parameters.std)
        self.encoder: nn.Module = AutoModel.from_config(settings)
        if list(getattr(self.encoder, "pooler", None) or nn.Identity().parameters()):
            self.encoder.pooler = None
        self.interpolate = getattr(settings, "image_size", None) not in (None, parameters.image_size) and hasattr(
            getattr(self.encoder, "embeddings", None), "interpolate_pos_encoding"
        )
        self.width = _width(settings)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return blocks_of(self.encoder)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.normalize(pixels)
        more = {"interpolate_pos_encoding": True} if self.interpolate else {}
        states: Tensor = self.encoder(pixel_values=x, **more).last_hidden_state
        return states.mean(dim=(2, 3)) if states.ndim == 4 else states[:, 0]


def _width(settings: Any) -> int:
    """Channels of the last feature map, which each family names in its own way."""
    if getattr(settings, "hidden_sizes", None):
        return int(settings.hidden_sizes[-1])
    if hasattr(settings, "last_hidden_size"):
        return int(settings.last_hidden_size)
    return int(settings.hidden_size)


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the backbone's configuration is still open (`weights.complete` fills it in)."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.ImageEncoderParameters)
    if parameters.config is None:
        raise ValueError("image_encoder: give `weights` (a backbone, folder or hub id), or `config`")
    return Network(spec, ImageEncoder(parameters.config, parameters), parameters.dropout)
