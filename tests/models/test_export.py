"""Every architecture turns into a graph that computes the same at any batch size and, for text, any length."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import transformers

from export.onnx import export_onnx
from export.parity import check
from models import registry
from models.catalog import Activation
from models.spec import Classification, ModelSpec, Reconstruction
from tests.models.narrow import SMALL as SMALL_CNN
from tests.models.narrow import SMALL_CODES
from tests.models.settled import settle

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
slow = pytest.mark.slow


def text(config: transformers.PretrainedConfig, pooling: str = "mean") -> ModelSpec:
    return ModelSpec(
        architecture="text_encoder",
        hyperparameters={"config": config.to_dict(), "pooling": pooling},
        task=Classification(3),
    )


def image(config: transformers.PretrainedConfig, size: int = 32) -> ModelSpec:
    return ModelSpec(
        architecture="image_encoder",
        hyperparameters={"config": config.to_dict(), "image_size": size},
        task=Classification(3),
    )


NETWORKS = [
    pytest.param(
        ModelSpec(architecture="mlp", hyperparameters={"features": 4}, task=Classification(3)),
        id="mlp",
    ),
    pytest.param(
        ModelSpec(architecture="efficientnet_lite0", hyperparameters={"image_size": 64}, task=Classification(3)),
        id="lite0",
    ),
    *(
        pytest.param(
            ModelSpec(
                architecture="mlp",
                hyperparameters={"features": 4, "hidden": [8, 8], "activation": activation},
                task=Classification(3),
            ),
            id=f"mlp-{activation}",
            marks=() if activation in ("maxout", "rbf", "prelu") else slow,
        )
        for activation in get_args(Activation)
        if activation != "relu"
    ),
    *(
        pytest.param(
            ModelSpec(architecture=name, hyperparameters={"image_size": 32, **parameters}, task=Classification(3)),
            id=name,
            marks=() if name == "alexnet" else slow,  # response normalization is the one thing the others lack
        )
        for name, parameters in SMALL_CNN.items()
    ),
    *(
        pytest.param(
            ModelSpec(architecture=name, hyperparameters=parameters, task=Reconstruction()), id=f"{name}-{number}"
        )
        for number, (name, parameters) in enumerate(SMALL_CODES)
    ),
    pytest.param(text(transformers.BertConfig(vocab_size=100, **SMALL)), id="bert"),
    pytest.param(
        text(transformers.RobertaConfig(vocab_size=100, **SMALL), pooling="cls"), id="roberta-first-token", marks=slow
    ),
    pytest.param(
        text(transformers.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64)),
        id="distilbert",
        marks=slow,
    ),
    pytest.param(text(transformers.MPNetConfig(vocab_size=100, **SMALL)), id="mpnet", marks=slow),
    pytest.param(
        image(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
        id="resnet",
    ),
    pytest.param(
        image(transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)), id="convnext", marks=slow
    ),
    pytest.param(
        image(transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32)), id="mobilenet_v2", marks=slow
    ),
    pytest.param(image(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)), id="vit", marks=slow),
    pytest.param(
        image(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL), size=48), id="vit-at-another-size"
    ),
    pytest.param(
        image(
            transformers.SwinConfig(
                image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
            )
        ),
        id="swin",
        marks=slow,
    ),
]


def batch(spec: ModelSpec, items: int, length: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(items)
    if "features" in spec.hyperparameters:
        return {"vector": random.normal(size=(items, 4)).astype(np.float32)}
    if spec.architecture == "text_encoder":
        mask = np.ones((items, length), np.int64)
        mask[0, length // 2 :] = 0
        return {"input_ids": random.integers(5, 90, (items, length)), "attention_mask": mask}
    size = spec.hyperparameters["image_size"]
    return {"pixels": random.integers(0, 256, (items, size, size, 3), dtype=np.uint8)}


@pytest.mark.parametrize("spec", NETWORKS)
def test_the_graph_computes_what_the_network_computes(spec: ModelSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = registry.build(spec)
    settle(network, *(torch.from_numpy(array) for array in batch(spec, 64, 12).values()))
    example = batch(spec, 2, 9)
    with torch.no_grad():
        features = network(*(torch.from_numpy(array) for array in example.values()))["embedding"]
    assert (features[0] - features[1]).abs().max() > 0.01, "features that are all alike would agree with anything"
    export_onnx(network, tmp_path, example)
    parity = check(network, tmp_path, [batch(spec, 5, 16), batch(spec, 1, 4)])
    assert {1, 5} <= set(parity.batch_sizes)
    assert {4, 16} <= set(parity.lengths) or spec.architecture != "text_encoder"
