"""Recipe: all that one run may set. The API's body, the command line's YAML and the job row are this Struct.

Its first fields are those of OpenAI's fine_tuning.jobs.create, so that OpenAI's clients work unchanged; the others have
defaults that suit fine-tuning a pre-trained backbone. "auto" is chosen by the rules of `finetune.automatic`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from models.catalog import MOST_MEMBERS, MOST_PASSES, Modality, Vote
from models.spec import HeadName, ModelSpec

Auto = Literal["auto"]
Positive = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0.0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0.0)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section of the recipe: an unknown field is an error, never ignored."""


class Hyperparameters(Part, frozen=True, kw_only=True):
    """OpenAI's three, and an absolute learning rate. The multiplier scales the automatic rate."""

    n_epochs: Auto | Annotated[int, msgspec.Meta(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, msgspec.Meta(ge=1, le=4096)] = "auto"
    learning_rate_multiplier: Auto | PositiveFloat = "auto"
    learning_rate: Auto | PositiveFloat = "auto"


class Supervised(Part, frozen=True, kw_only=True):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Part, frozen=True, kw_only=True):
    """OpenAI's newer place for the hyper-parameters."""

    type: Literal["supervised"] = "supervised"
    supervised: Supervised = Supervised()


class Data(Part, frozen=True, kw_only=True):
    """Which columns hold what, and how the split is made when there is no validation file.

    target_columns: for several numbers an item; empty: the label column holds the one.
    translation_column: of pairs, whose sources are in the text column.
    Split by item (duplicates stay on one side), stratified by class, seeded by the recipe's seed. `test` is held out
    from training and from stopping; the published metrics are measured on it (on validation when it is 0).
    """

    text_column: str = "text"
    series_column: str = "series"
    image_column: str = "image"
    label_column: str = "label"
    target_columns: tuple[str, ...] = ()
    translation_column: str = "translation"
    validation: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.1
    test: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0


class CrossEntropy(Part, frozen=True, kw_only=True, tag="cross_entropy", tag_field="type"):
    """Softmax cross-entropy. `class_weights`: "balanced" is n / (classes · n_c), or a weight for each label."""

    label_smoothing: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = None


class KlDivergence(Part, frozen=True, kw_only=True, tag="kl_divergence", tag_field="type"):
    """Kullback-Leibler divergence of the answered from the true distribution: cross-entropy less the entropy of the
    (smoothed) target, so that 0 is the best that can be had."""

    label_smoothing: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.1
    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = None


class BinaryCrossEntropy(Part, frozen=True, kw_only=True, tag="binary_cross_entropy", tag_field="type"):
    """Two classes by one sigmoid unit. `positive_weight`: what an item of the second label counts."""

    positive_weight: PositiveFloat = 1.0


class MultiLabel(Part, frozen=True, kw_only=True, tag="multi_label", tag_field="type"):
    """Any number of labels an item, a sigmoid each: the label is a list (JSONL, Parquet), or labels with | between."""


class SquaredError(Part, frozen=True, kw_only=True, tag="squared_error", tag_field="type"):
    """Numbers, by the mean of squared errors: the answer is the mean. In deviations of each target."""


class AbsoluteError(Part, frozen=True, kw_only=True, tag="absolute_error", tag_field="type"):
    """Numbers, by the mean of absolute errors: the answer is the median. In deviations of each target."""


class Gaussian(Part, frozen=True, kw_only=True, tag="gaussian", tag_field="type"):
    """Numbers with a deviation each, by the likelihood of a normal distribution (Nix and Weigend 1994)."""


HeadObjective = CrossEntropy | BinaryCrossEntropy | MultiLabel | SquaredError | AbsoluteError | Gaussian


class Head(Part, frozen=True, kw_only=True):
    """One of several heads. `columns`: of its labels or numbers; empty: the one of the head's name. `weight`: of its
    loss in the sum."""

    objective: HeadObjective = CrossEntropy()
    columns: tuple[str, ...] = ()
    weight: PositiveFloat = 1.0


class MultiTask(Part, frozen=True, kw_only=True, tag="multi_task", tag_field="type"):
    """Several heads on one trunk (Caruana 1997), each with columns of the table; an empty cell teaches its head
    nothing."""

    heads: Annotated[dict[HeadName, Head], msgspec.Meta(min_length=1, max_length=32)]


class Adversarial(Part, frozen=True, kw_only=True, tag="adversarial", tag_field="type"):
    """Images from noise, by a generator that a discriminator cannot tell from the data (Goodfellow et al. 2014).

    discriminator_steps: for each step of the generator; every one is a step of the run, with a batch of its own.
    generator_loss: "minimax" is the paper's game, "non_saturating" its advice: the gradient lasts where the
        discriminator wins. label_smoothing: taken off the 1 that real images are labelled with (Salimans et al. 2016).
    """

    discriminator_steps: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    generator_loss: Literal["non_saturating", "minimax"] = "non_saturating"
    label_smoothing: Annotated[float, msgspec.Meta(ge=0.0, lt=0.5)] = 0.0


class L1Sparsity(Part, frozen=True, kw_only=True, tag="l1", tag_field="type"):
    """weight · Σ |code|, an item. The decoder could make up for a small code by large weights; weight decay is what
    holds it back."""

    weight: PositiveFloat = 0.001


class KlSparsity(Part, frozen=True, kw_only=True, tag="kl", tag_field="type"):
    """weight · Σ KL(activation ‖ mean of a unit over the batch), for a sigmoid code: each unit is to be on for such a
    share of the items (Ng 2011)."""

    weight: PositiveFloat = 0.01
    activation: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.05


class Reconstruction(Part, frozen=True, kw_only=True, tag="reconstruction", tag_field="type"):
    """Inputs again from their codes, without labels, by the mean of squared errors; vectors in deviations of each
    number, pixels from 0 to 1.

    noise, masking: deviation of Gaussian noise on inputs, and the share of their numbers that is put to the mean; in
        training, and what is to come back is the input without them (denoising, Vincent et al. 2008).
    contraction: weight of ‖∂code/∂input‖², the squared Frobenius norm (Rifai et al. 2011).
    """

    noise: NonNegative = 0.0
    masking: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    sparsity: L1Sparsity | KlSparsity | None = None
    contraction: NonNegative = 0.0


class Elbo(Part, frozen=True, kw_only=True, tag="elbo", tag_field="type"):
    """The evidence lower bound of a variational autoencoder, without labels (Kingma and Welling 2014). `beta`: of the
    divergence from the prior (Higgins et al. 2017)."""

    beta: PositiveFloat = 1.0


class MaskedTokens(Part, frozen=True, kw_only=True, tag="masked_tokens", tag_field="type"):
    """Texts without labels: tokens that are hidden, from all others (Devlin et al. 2019). What is learned so is a
    beginning for another objective: give the published model as the `model` of a next recipe. A text of more than
    max_length tokens is learned in parts."""


class NextToken(Part, frozen=True, kw_only=True, tag="next_token", tag_field="type"):
    """Texts without labels: each token from those before it. A language model. A text of more than max_length tokens
    is learned in parts.

    packing: the texts of a batch lie behind each other in as few rows as hold them, and none sees another: the same
        loss, without padding that is computed for nothing. Without it batches are of texts alike in length."""

    packing: bool = True


class Chat(Part, frozen=True, kw_only=True, tag="chat", tag_field="type"):
    """Conversations: each token that the assistant says, the end of its turn too, from all before it; what is said to
    it is read and not learned. Of prompts and completions the completion and its end. One of more than max_length
    tokens is cut, or left out where nothing to learn would be left. packing: as for next_token."""

    packing: bool = True


class Translation(Part, frozen=True, kw_only=True, tag="translation", tag_field="type"):
    """A text from a text, by the cross-entropy of its every token given those before it. label_smoothing: the share of
    the probability that is spread over all tokens (Vaswani et al. 2017, section 5.4)."""

    label_smoothing: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.1


Objective = (
    HeadObjective
    | KlDivergence
    | MultiTask
    | Reconstruction
    | Elbo
    | Adversarial
    | MaskedTokens
    | NextToken
    | Chat
    | Translation
)


class ConfidencePenalty(Part, frozen=True, kw_only=True, tag="confidence", tag_field="type"):
    """weight · -H(answered distribution): answers that are too sure cost (Pereyra et al. 2017). For classes."""

    weight: PositiveFloat = 0.1


class FeaturePenalty(Part, frozen=True, kw_only=True, tag="features", tag_field="type"):
    """weight · mean of |feature| (norm 1) or feature² (norm 2) of the layer before the head."""

    weight: PositiveFloat = 0.01
    norm: Literal[1, 2] = 1


class Coral(Part, frozen=True, kw_only=True, tag="coral", tag_field="type"):
    """Domain adaptation: weight · ‖C_source - C_target‖² / (4 width²), the covariances of the layer before the head on
    training items and on those of `file`, unlabelled data of the domain that is to be answered (Sun and Saenko 2016).
    file: the id of an uploaded file (a path on the command line), with data like the training file's; its labels, if it
    has any, are not looked at.
    """

    file: Annotated[str, msgspec.Meta(min_length=1)]
    weight: PositiveFloat = 1.0


Term = ConfidencePenalty | FeaturePenalty | Coral


class AdamW(Part, frozen=True, kw_only=True, tag="adamw", tag_field="type"):
    weight_decay: NonNegative = 0.01
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: PositiveFloat = 1e-8


class Adam(Part, frozen=True, kw_only=True, tag="adam", tag_field="type"):
    """`weight_decay` is L2: part of the gradient, and so of what its size is measured by. AdamW keeps it apart."""

    weight_decay: NonNegative = 0.0
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: PositiveFloat = 1e-8


class Sgd(Part, frozen=True, kw_only=True, tag="sgd", tag_field="type"):
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def __post_init__(self) -> None:
        needs_momentum(self.nesterov, self.momentum)


class AdaGrad(Part, frozen=True, kw_only=True, tag="adagrad", tag_field="type"):
    weight_decay: NonNegative = 0.0
    epsilon: PositiveFloat = 1e-10


class RmsProp(Part, frozen=True, kw_only=True, tag="rmsprop", tag_field="type"):
    """`decay`: what the mean of squared gradients keeps of itself at a step."""

    decay: Share = 0.9
    momentum: Share = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    epsilon: PositiveFloat = 1e-8

    def __post_init__(self) -> None:
        needs_momentum(self.nesterov, self.momentum)


def needs_momentum(nesterov: bool, momentum: float) -> None:
    if nesterov and momentum == 0.0:
        raise ValueError("nesterov is a kind of momentum; give a momentum above 0")


# Weight decay never touches biases and the scales of norms, whichever optimizer it is.
Optimizer = AdamW | Adam | Sgd | AdaGrad | RmsProp


class Schedule(Part, frozen=True, kw_only=True):
    """Linear warm-up over a share of all steps, then `decay` to `floor` times the peak rate.

    step: the rate falls to `factor` times what it was at each of the `milestones`, shares of all steps.
    plateau: it falls so when the validation loss has not improved for `patience` evaluations.
    """

    warmup: Share = 0.1
    decay: Literal["cosine", "linear", "constant", "step", "plateau"] = "cosine"
    floor: Share = 0.0
    factor: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.1
    milestones: tuple[Share, ...] = (0.5, 0.75)
    patience: Positive = 2


class Regularization(Part, frozen=True, kw_only=True):
    """Beside the optimizer's weight decay (L2).

    l1: pulls every weight, not biases and norms, to exactly zero by this times the learning rate at each step.
    weight_noise: deviation of Gaussian noise on the weights while a gradient is computed, as a share of each tensor's
        own deviation.
    """

    l1: NonNegative = 0.0
    weight_noise: NonNegative = 0.0


class Lora(Part, frozen=True, kw_only=True):
    """The trunk stays as it is, and beside its linear layers learn two thin matrices each, B A · alpha / rank, that are
    added to their weights in the end (Hu et al. 2022). Layers that freeze or train_last hold back get none.

    rslora: alpha / √rank instead, so that a high rank learns as fast as a low one (Kalajdzievski 2023).
    dropout: of what goes into A. targets: names of layers, or the ends of such ("q_proj"); "all-linear": every linear
        layer of the trunk, but the one that answers.
    """

    rank: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = "all-linear"
    rslora: bool = False


class Transfer(Part, frozen=True, kw_only=True):
    """What of a pre-trained trunk learns, when, and how fast.

    freeze: name of the last frozen block (everything up to it, from the input), "all" for the whole trunk, None for
        nothing. An unknown name is an error that lists the blocks.
    train_last: instead, how many blocks before the head learn, beside the head; 0: only the head does.
    unfreeze_epoch: the epoch (from 0) at whose start the frozen part is released; None: never.
    gradual: release one block an epoch from then on, the nearest to the head first, instead of all at once.
    layer_decay: learning rate of a block is peak · layer_decay^(distance from the head); 1.0: all alike.
    lora: an adapter learns in the place of the trunk.
    """

    freeze: str | None = None
    train_last: Annotated[int, msgspec.Meta(ge=0)] | None = None
    unfreeze_epoch: Annotated[int, msgspec.Meta(ge=1)] | None = None
    gradual: bool = False
    layer_decay: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.freeze is not None and self.train_last is not None:
            raise ValueError("freeze and train_last say the same in two ways; give one of them")
        if self.unfreeze_epoch is not None and self.freeze is None and self.train_last is None:
            raise ValueError("unfreeze_epoch: nothing is frozen; say what by freeze or train_last")
        if self.gradual and self.unfreeze_epoch is None:
            raise ValueError("gradual: give unfreeze_epoch, the epoch that it begins with")
        if self.lora is not None and (self.freeze == "all" or self.train_last == 0):
            raise ValueError("lora: with the whole trunk frozen no layer is left to adapt; leave one of them out")
        if self.lora is not None and self.unfreeze_epoch is not None:
            raise ValueError("unfreeze_epoch: with lora the trunk stays as it is for good; leave one of them out")

    @property
    def head_only(self) -> bool:
        """Whether nothing but the head ever learns."""
        return (self.freeze == "all" or self.train_last == 0) and self.unfreeze_epoch is None


class Quantization(Part, frozen=True, kw_only=True):
    """What a language model is published with: matrices in 8 or 4 bits, or everything in float16, which is what runs
    on a GPU. The weights that training goes on from stay float32. most_loss: the share that the perplexity on the
    held-out split may rise by, or nothing is published."""

    weights: Literal["float16", "int8", "int4"] = "int8"
    most_loss: PositiveFloat = 0.02


class Optimization(Part, frozen=True, kw_only=True):
    """The graph is published in these precisions, too: int8 for CPUs (matrices of texts; convolutions and matrices of
    all else, calibrated on training items), float16 and bfloat16 for CUDA. One that loses more than the share
    `most_loss` of a metric on the held-out split is left out. The fastest of them serves."""

    precisions: Annotated[tuple[Literal["float16", "bfloat16", "int8"], ...], msgspec.Meta(min_length=1)] = (
        "int8",
        "float16",
    )
    most_loss: PositiveFloat = 0.01


class Augmentation(Part, frozen=True, kw_only=True):
    """Of training items only. For images: degrees, shares of the side, probability, and jitter factor.

    crop: the largest share of each side that is cut off; the rest, from anywhere, is brought back to size.
    noise: deviation of Gaussian noise on every pixel, as a share of the full range.
    mixup, cutmix: α of the Beta distribution that two images of a batch, and their losses, are mixed by; as a sum of
        both (Zhang et al. 2018), or as a rectangle of one in the other (Yun et al. 2019). With both, a coin decides.
    word_dropout: for texts, the share of the tokens that are left out, another choice at each step (Iyyer et al. 2015).
    smote: for tables, fill rare classes up with items between an item and one of so many neighbours; 0: do not.
    """

    rotation: Annotated[float, msgspec.Meta(ge=0.0, le=180.0)] = 0.0
    translation: Share = 0.0
    scale: Share = 0.0
    crop: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    flip: Share = 0.0
    colour: Share = 0.0
    noise: Share = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    word_dropout: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    smote: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0

    def misplaced(self, modality: Modality) -> str | None:
        """The first field that is set and is for data of another kind; None when there is none."""
        others = {"word_dropout": "text", "smote": "vector"}
        for field in self.__struct_fields__:
            if getattr(self, field) and others.get(field, "image") != modality:
                return field
        return None


class Stopping(Part, frozen=True, kw_only=True):
    """Stop when `metric` on the validation split has not improved by `min_delta` for `patience` evaluations.

    metric: "loss", or what the objective measures beside it: accuracy, macro_f1; mae, rmse, r2; ...
        of one of several heads "<head>.<figure>".

    retrain: whether the validation split is learned from, too, once the best step is known (Goodfellow, Bengio and
        Courville 2016, section 7.8). keep: no, the weights of the best step are published. scratch: from the start
        again on both splits, for as many steps as the best evaluation had. continue: on from the best weights on both
        splits, at the rate they had but at least a tenth of the peak, until the loss on the validation split is below
        what it was on the training split; for as many epochs again at most.
    """

    metric: str = "loss"
    patience: Positive = 3
    min_delta: NonNegative = 0.0
    retrain: Literal["keep", "scratch", "continue"] = "keep"


class Bagging(Part, frozen=True, kw_only=True, tag="bagging", tag_field="type"):
    """So many networks learn, each from another seed and, with `bootstrap`, from a draw of its own, with replacement,
    of as many items as there are to learn from (Breiman 1996). They answer as one: by the mean of their probabilities
    or numbers, or by what the majority votes for."""

    members: Annotated[int, msgspec.Meta(ge=2, le=MOST_MEMBERS)] = 5
    vote: Vote = "mean"
    bootstrap: bool = True


class Joined(Part, frozen=True, kw_only=True, tag="published", tag_field="type"):
    """`model` and these `models`, all of them published ("digits" or "digits:3"), answer as one. They answer the same
    labels and read their input alike. Nothing is trained: the file is what the figures are measured on."""

    models: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MOST_MEMBERS - 1)]
    vote: Vote = "mean"


class McDropout(Part, frozen=True, kw_only=True, tag="dropout", tag_field="type"):
    """Monte-Carlo dropout: the network answers by the mean of so many passes, each without other units (Gal and
    Ghahramani 2016). Which units those are is drawn once, so that equal inputs have equal answers."""

    passes: Annotated[int, msgspec.Meta(ge=2, le=MOST_PASSES)] = 32


Ensemble = Bagging | Joined | McDropout


class Recipe(Part, frozen=True, kw_only=True):
    """One fine-tuning run. See each section for its rules.

    model: a backbone's name, a published model ("digits" or "digits:3", training goes on from it), a hub id, or a
        whole ModelSpec.
    training_file, validation_file: ids of uploaded files (paths on the command line).
    name: under which the result is published; None: "<model>-<suffix>", or the model's name.
    objective: what is learned; None: what the architecture learns first of all, classes mostly.
    terms: added to the objective's loss in training; the losses that are reported are without them.
    ensemble: several networks, or passes through one, that answer together and say how far they are apart.
    optimizer: "auto" is AdamW, and Adam with a beta1 of 0.5 in an adversarial game (Radford et al. 2016).
    gradient_checkpointing: what the layers of a Transformer compute is forgotten and computed again for the gradients:
        the same gradients in less memory and more time (Chen et al. 2016).
    checkpoint_seconds: a checkpoint is written at least this often.
    evaluations_per_epoch: how often the validation split is measured.
    quantization: of a language model that is published; None: it has float32 weights.
    optimization: of a classifier or regression that is published; None: its graph is float32 alone.
    """

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=512)] | ModelSpec
    training_file: Annotated[str, msgspec.Meta(min_length=1)]
    validation_file: str | None = None
    suffix: Name | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] | None = None

    name: Name | None = None
    data: Data = Data()
    image_size: Annotated[int, msgspec.Meta(ge=16, le=1024)] | None = None
    max_length: Annotated[int, msgspec.Meta(ge=4, le=8192)] | None = None
    objective: Objective | None = None
    terms: tuple[Term, ...] = ()
    ensemble: Ensemble | None = None
    optimizer: Auto | Optimizer = "auto"
    schedule: Schedule = Schedule()
    regularization: Regularization = Regularization()
    transfer: Transfer = Transfer()
    augmentation: Augmentation = Augmentation()
    stopping: Stopping | None = None
    gradient_accumulation: Positive = 1
    gradient_checkpointing: bool = False
    gradient_clip: PositiveFloat | None = 1.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    evaluations_per_epoch: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    checkpoint_seconds: NonNegative = 30.0
    quantization: Quantization | None = None
    optimization: Optimization | None = None

    def begins_with(self) -> list[str]:
        """What it begins with and calls by a name, of a backbone or of a published model."""
        joined = self.ensemble.models if isinstance(self.ensemble, Joined) else []
        return [name for name in (self.model, *joined) if isinstance(name, str)]

    def unlabelled_files(self) -> tuple[str, ...]:
        """Those of other domains, that the terms name."""
        return tuple(dict.fromkeys(term.file for term in self.terms if isinstance(term, Coral)))

    def training_hyperparameters(self) -> Hyperparameters:
        """From `method` or from `hyperparameters`, whichever is given. Raises ValueError when both are."""
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError("hyperparameters: give them once, in `hyperparameters` or in `method`, not in both")
        if self.method is not None:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()
