"""ResNet, ConvNeXt, MobileNet or ViT from transformers as a trunk."""

from __future__ import annotations

from typing import Any

import torch
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
        if getattr(self.encoder, "pooler", None) is not None:
            # With parameters it is a layer of its own training task; without, the average below does the same.
            self.encoder.pooler = nn.Identity()
        self.interpolate = getattr(settings, "image_size", None) not in (None, parameters.image_size) and hasattr(
            getattr(self.encoder, "embeddings", None), "interpolate_pos_encoding"
        )
        # Each family names the channels of its last feature map in its own way; the features themselves have them.
        size = parameters.image_size
        with torch.no_grad():
            self.width = self.eval()(torch.zeros(1, size, size, 3, dtype=torch.uint8)).shape[1]
        self.train()

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return blocks_of(self.encoder)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.normalize(pixels)
        more = {"interpolate_pos_encoding": True} if self.interpolate else {}
        states: Tensor = self.encoder(pixel_values=x, **more).last_hidden_state
        return states.mean(dim=(2, 3)) if states.ndim == 4 else states[:, 0]


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the backbone's configuration is still open (`weights.complete` fills it in)."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.ImageEncoderParameters)
    if parameters.config is None:
        raise ValueError("image_encoder: give `weights` (a backbone, folder or hub id), or `config`")
    return Network(spec, ImageEncoder(parameters.config, parameters), parameters.dropout)
