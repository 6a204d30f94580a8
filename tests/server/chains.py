"""Networks that are tables: the logits of a token are a sum over the tokens before it, so answers can be worked out.

logits = follows[last token] + Σ lasting[token] over all tokens so far, of a translation from the beginning on, and
over its source with `source`. The tokens so far are the state that grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from export.bundle import Generation, GraphSpec, Lineage, Manifest, Parity, TensorSpec
from export.processing.inputs import TextInput
from export.processing.text import BYTES
from export.publish import publish
from export.staging import staging

PAD, UNKNOWN, BEGIN, END = range(4)
SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
ENGLISH = ["the", "cat", "dog", "sleeps", "today"]
# What is said, one after another, and what an answer begins with.
CHATS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no systems here') }}{% endif %}{{ message.content ~ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}the{% endif %}"
)
PAST = ("past_keys0", "past_values0")
GERMAN = ["der", "Kater", "Hund", "schläft", "heute"]


class Chain:
    """The tables [vocabulary, vocabulary], what follows from them, and their graphs."""

    def __init__(
        self, follows: np.ndarray, lasting: np.ndarray | None = None, source: np.ndarray | None = None
    ) -> None:
        self.follows = follows.astype(np.float32)
        self.vocabulary = len(follows)
        nothing = np.zeros_like(self.follows)
        self.lasting = nothing if lasting is None else lasting.astype(np.float32)
        self.source = nothing if source is None else source.astype(np.float32)

    def log_probabilities(self, tokens: Sequence[int], source: Sequence[int] = ()) -> np.ndarray:
        """Of the token behind `tokens`, float64 [vocabulary]."""
        logits = self.follows[tokens[-1]] + self.lasting[list(tokens)].sum(0) + self.source[list(source)].sum(0)
        logits = logits.astype(np.float64)
        found: np.ndarray = logits - np.log(np.exp(logits).sum())
        return found

    def encoder(self) -> onnx.ModelProto:
        """`memory` float32 [batch, sequence, vocabulary] and, as a first state, `position` int64 [batch, 1]: zeros."""
        nodes = [
            helper.make_node("Gather", ["source", "input_ids"], ["memory"]),
            helper.make_node("Mul", ["attention_mask", "zero"], ["zeros"]),
            helper.make_node("ReduceSum", ["zeros", "second"], ["position"], keepdims=1),
        ]
        inputs = [tensor(name, "int64", "batch", "sequence") for name in ("input_ids", "attention_mask")]
        outputs = [
            tensor("memory", "float32", "batch", "sequence", self.vocabulary),
            tensor("position", "int64", "batch", 1),
        ]
        return model(nodes, inputs, outputs, {"source": self.source, "zero": np.int64(0), "second": np.array([1])})

    def decoder(self) -> onnx.ModelProto:
        """The step graph of a translation. Its `attention` to a source token is the token that is fed, + 100 · steps
        before it."""
        nodes = [
            *self._sum(["past", "token"]),
            helper.make_node("Cast", ["attention_mask"], ["there"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["there", "third"], ["kept"]),
            helper.make_node("Mul", ["memory", "kept"], ["read"]),
            helper.make_node("ReduceSum", ["read", "second"], ["reading"], keepdims=0),
            helper.make_node("Add", ["chain", "reading"], ["logits"]),
            helper.make_node("Add", ["position", "one"], ["next_position"]),
            helper.make_node("Mul", ["position", "hundred"], ["hundreds"]),
            helper.make_node("Add", ["token", "hundreds"], ["number"]),
            helper.make_node("Cast", ["number"], ["weight"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["there", "weight"], ["attention"]),
        ]
        inputs = [
            tensor("token", "int64", "batch", 1),
            tensor("attention_mask", "int64", "batch", "sequence"),
            tensor("memory", "float32", "batch", "sequence", self.vocabulary),
            tensor("position", "int64", "batch", 1),
            tensor("past", "int64", "batch", "steps"),
        ]
        outputs = [
            tensor("logits", "float32", "batch", self.vocabulary),
            tensor("attention", "float32", "batch", "sequence"),
            tensor("next_position", "int64", "batch", 1),
            tensor("next_past", "int64", "batch", "steps + 1"),
        ]
        more = {"one": np.int64(1), "hundred": np.int64(100), "third": np.array([2]), "second": np.array([1])}
        return model(nodes, inputs, outputs, {**self._tables(), **more})

    def language_model(self) -> onnx.ModelProto:
        """The slot graph of a language model: what follows the last token alone. Its keys and values hold nothing."""
        nodes = [
            helper.make_node("Reshape", ["token", "flat"], ["tokens"]),
            helper.make_node("Gather", ["tokens", "asked"], ["last"]),
            helper.make_node("Gather", ["follows", "last"], ["logits"]),
            *(helper.make_node("Identity", [name], [f"next_{name}"]) for name in PAST),
        ]
        past = [tensor(name, "float32", "batch", 1, "slot", 1) for name in PAST]
        inputs = [
            tensor("token", "int64", "batch", "tokens"),
            tensor("length", "int32", "batch"),
            tensor("longest", "int32"),
            tensor("asked", "int64", "places"),
            *past,
        ]
        outputs = [
            tensor("logits", "float32", "places", self.vocabulary),
            *(tensor(f"next_{name}", "float32", "batch", 1, "slot", 1) for name in PAST),
        ]
        return model(nodes, inputs, outputs, {"follows": self.follows, "flat": np.array([-1])})

    def _sum(self, pasts: list[str]) -> list[onnx.NodeProto]:
        """`next_past` and `chain`: what follows the last token, and what all tokens that count add."""
        return [
            helper.make_node("Concat", pasts, ["next_past"], axis=1),
            helper.make_node("Gather", ["lasting", "next_past"], ["all"]),
            helper.make_node("ReduceSum", ["all", "middle"], ["lasts"], keepdims=0),
            helper.make_node("Gather", ["token", "minus_one"], ["newest"], axis=1),
            helper.make_node("Gather", ["follows", "newest"], ["following"]),
            helper.make_node("Add", ["following", "lasts"], ["chain"]),
        ]

    def _tables(self) -> dict[str, Any]:
        places = {"minus_one": np.int64(-1), "middle": np.array([1])}
        return {"follows": self.follows, "lasting": self.lasting, **places}


def chance(vocabulary: int, seed: int) -> Chain:
    """Tables of random numbers: padding and the beginning come never, the end comes in time."""
    numbers = np.random.default_rng(seed)
    follows, lasting, source = (
        numbers.normal(size=(3, vocabulary, vocabulary)) * np.array([1.5, 0.3, 0.3])[:, None, None]
    )
    follows[:, [PAD, UNKNOWN, BEGIN]] = -30.0
    return Chain(follows, lasting, source)


def tensor(name: str, dtype: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, Any],
) -> onnx.ModelProto:
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "chain", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made)
    return made


def specs(values: Sequence[onnx.ValueInfoProto]) -> list[TensorSpec]:
    """The tensors of a graph as a manifest describes them."""
    return [
        TensorSpec(
            name=value.name,
            dtype=str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            shape=[axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
            unit="1",
        )
        for value in values
    ]


def publish_translation(repository: Path, name: str = "german", max_length: int = 16) -> Manifest:
    """Word for word, the words in the order of `GERMAN`, each once."""
    words = len(SPECIAL) + len(ENGLISH)
    follows, lasting, source = np.zeros((3, words, words))
    follows[:, :BEGIN] = follows[:, BEGIN] = -30.0
    for place in range(len(SPECIAL), words):
        source[place, place] = 40.0 - 2 * place
        lasting[place, place] = -60.0
    follows[:, END] = 8.0
    chain = Chain(follows, lasting, source)
    graphs = {"model": chain.encoder(), "decoder": chain.decoder()}
    return _publish(repository, name, "translation", graphs, max_length, ENGLISH, GERMAN)


def publish_language_model(
    repository: Path, name: str = "tales", max_length: int = 64, ends: bool = True, template: str | None = CHATS
) -> Manifest:
    """ "the cat sleeps today", or the dog, with a chance; without `ends`, again and again."""
    follows = np.full((len(SPECIAL) + len(ENGLISH),) * 2, -30.0)
    the, cat, dog, sleeps, today = range(len(SPECIAL), len(follows))
    follows[BEGIN, the] = follows[cat, sleeps] = follows[dog, sleeps] = follows[sleeps, today] = 0.0
    follows[the, [cat, dog]] = np.log([0.75, 0.25])
    follows[today, END if ends else the] = 0.0
    generation = Generation(context=max_length, end_token_ids=[END], chat_template=template and "chat_template.jinja")
    graphs = {"model": Chain(follows).language_model()}
    files = {} if template is None else {"chat_template.jinja": template}
    return _publish(repository, name, "language_model", graphs, max_length, ENGLISH, None, generation, files)


def publish_letters(repository: Path, name: str = "letters") -> Manifest:
    """Every byte is a token, and after each every other is as likely, or the end."""
    spec = TextInput(max_length=512, eos_token_id=256, tokenizer="tokenizer.json")
    alphabet = byte_tokenizer()
    generation = Generation(context=512, end_token_ids=[256], chat_template="chat_template.jinja")
    graphs = {"model": Chain(np.zeros((257, 257))).language_model()}
    files = {"chat_template.jinja": "{% for message in messages %}{{ message.content }}\n{% endfor %}"}
    return _publish_files(repository, name, "language_model", graphs, spec, alphabet, None, generation, files)


def byte_tokenizer() -> bytes:
    """A token for each byte, in their order, and <end>."""
    made = Tokenizer(models.BPE(dict(BYTES), []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return str(made.to_str()).encode()


def _publish(
    repository: Path,
    name: str,
    task: str,
    graphs: dict[str, onnx.ModelProto],
    max_length: int,
    words: list[str],
    target_words: list[str] | None,
    generation: Generation | None = None,
    files: Mapping[str, str] | None = None,
) -> Manifest:
    spec = TextInput(max_length=max_length, bos_token_id=BEGIN, eos_token_id=END)
    return _publish_files(repository, name, task, graphs, spec, tokenizer(words), target_words, generation, files)


def _publish_files(
    repository: Path,
    name: str,
    task: str,
    graphs: dict[str, onnx.ModelProto],
    spec: TextInput,
    tokens: bytes,
    target_words: list[str] | None,
    generation: Generation | None,
    files: Mapping[str, str] | None,
) -> Manifest:
    described = {
        graph: GraphSpec(inputs=specs(made.graph.input), outputs=specs(made.graph.output))
        for graph, made in graphs.items()
    }
    main = described.pop("model")
    written = None
    with staging(repository) as folder:
        for graph, made in graphs.items():
            (folder / f"{graph}.onnx").write_bytes(made.SerializeToString())
        (folder / spec.tokenizer).write_bytes(tokens)
        for file, content in (files or {}).items():
            (folder / file).write_text(content)
        if target_words is not None:
            written = msgspec.structs.replace(spec, tokenizer="target_tokenizer.json")
            (folder / written.tokenizer).write_bytes(tokenizer(target_words))
        draft = Manifest(
            name=name,
            version=0,
            created_at=datetime.now(UTC),
            task=task,
            input=spec,
            output_text=written,
            generation=generation,
            inputs=main.inputs,
            outputs=main.outputs,
            graphs=described,
            model={"architecture": "transformer", "hyperparameters": {}},
            parity=Parity(samples=1, largest_difference=0.0, tolerance=1e-4, top1_disagreements=0, batch_sizes=[1]),
            lineage=Lineage(base_model="transformer"),
            files={},
        )
        return publish(folder, repository, draft)


def tokenizer(words: list[str]) -> bytes:
    """A word is a token; every text is put between the beginning and the end."""
    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token=SPECIAL[UNKNOWN])
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    made.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BEGIN]} $A {SPECIAL[END]}",
        special_tokens=[(SPECIAL[BEGIN], BEGIN), (SPECIAL[END], END)],
    )
    return str(made.to_str()).encode()
