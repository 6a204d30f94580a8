"""ResNet, ConvNeXt, MobileNet, ViT and their relatives from transformers as a trunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import catalog
from models.backbones.blocks import blocks_of
from models.backbones.encoder import build_encoder
from models.network import Headed, Network, Normalize, Trunk
from models.spec import ModelSpec

# Families whose features are known to be what their own classifiers see; one is added here with its test.
FAMILIES = ("convnext", "convnextv2", "deit", "dinov2", "mobilenet_v1", "mobilenet_v2", "regnet", "resnet", "swin",
            "vit")  # fmt: skip


class ImageEncoder(Trunk):
    """uint8 [batch, height, width, 3] → float32 [batch, channels].

    The class token where the family has one, else the average over all positions, as the family itself pools it
    (ConvNeXt normalizes it once more).
    """

    input_names = ("pixels",)

    def __init__(self, config: dict[str, Any], parameters: catalog.ImageEncoderParameters) -> None:
        super().__init__()
        self.normalize = Normalize(parameters.mean, parameters.std)
        self.encoder = build_encoder(config)
        embeddings = getattr(self.encoder, "embeddings", None)
        self.class_token = hasattr(embeddings, "cls_token")
        if self.class_token and getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = nn.Identity()  # a layer of its own training task
        trained_size = getattr(self.encoder.config, "image_size", parameters.image_size)
        self.interpolate = trained_size != parameters.image_size and hasattr(embeddings, "interpolate_pos_encoding")
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
        answer = self.encoder(pixel_values=x, **more)
        features: Tensor = answer.last_hidden_state[:, 0] if self.class_token else answer.pooler_output.flatten(1)
        return features


def build(spec: ModelSpec) -> Network:
    """Raises ValueError when the backbone's configuration is still open (`weights.complete` fills it in) or of no
    family that is known."""
    parameters = catalog.hyperparameters(spec)
    assert isinstance(parameters, catalog.ImageEncoderParameters)
    if parameters.config is None:
        raise ValueError("image_encoder: give `weights` (a backbone, folder or hub id), or `config`")
    if parameters.config.get("model_type") not in FAMILIES:
        raise ValueError(
            f"image_encoder: a {parameters.config.get('model_type')} is not among its families: {', '.join(FAMILIES)}"
        )
    return Headed(spec, ImageEncoder(parameters.config, parameters), parameters.dropout)
