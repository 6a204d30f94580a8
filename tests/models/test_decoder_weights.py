"""Checkpoints of decoders: they compute what transformers computes, and their texts are read as it reads them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import msgspec
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

from models import registry
from models.backbones import weights
from models.catalog import DECODER_FAMILIES
from models.network import Network
from models.spec import LanguageModel, ModelSpec
from tests.models import checkpoints
from tests.models.checkpoints import BEGIN, END, TEMPLATE, TURN, VOCABULARY, drawn

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
FAMILIES: dict[str, transformers.PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=16),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=BEGIN, eos_token_id=END
    ),
}
TEXT = "the dog sleeps in 2024, naïve ☃"


def loaded(source: str) -> Network:
    spec = weights.spec_for(source)
    network = registry.build(msgspec.structs.replace(spec, task=LanguageModel()))
    weights.load(network, source)
    return network.eval()


def agrees(network: Network, model: transformers.PreTrainedModel, tolerance: float = 1e-5) -> bool:
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = network(ids, torch.ones_like(ids))["logits"]
    assert expected.std() > 0.5, "answers that are all alike would agree with anything"
    return bool((found - expected).abs().max() < tolerance * expected.abs().max())


def test_every_family_is_under_test() -> None:
    assert set(FAMILIES) == set(DECODER_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_the_decoder_that_was_saved(family: str, tmp_path: Path) -> None:
    model = checkpoints.folder(FAMILIES[family], tmp_path)
    spec = weights.spec_for(str(tmp_path))
    assert (spec.architecture, spec.hyperparameters["max_length"]) == ("causal_decoder", 64)
    assert str(tmp_path) not in str(spec.hyperparameters)
    assert agrees(loaded(str(tmp_path)), model)


def test_its_language_is_that_of_its_files(tmp_path: Path) -> None:
    checkpoints.folder(FAMILIES["llama"], tmp_path)
    found = weights.language_of(str(tmp_path))
    assert (found.beginning, found.ends, found.padding, found.chat_template) == (BEGIN, (END, TURN), END, TEMPLATE)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert Tokenizer.from_str(found.tokenizer.decode()).encode(TEXT).ids == reference(TEXT).input_ids
    checkpoints.folder(FAMILIES["llama"], tmp_path / "bare", begins=False)
    assert weights.language_of(str(tmp_path / "bare")).beginning is None


def test_a_half_precision_checkpoint_in_several_files_is_read_in_float32(tmp_path: Path) -> None:
    drawn(FAMILIES["qwen2"]).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    network = loaded(str(tmp_path))
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert agrees(network, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gguf_file_is_the_decoder_that_it_was_made_of(family: str, tmp_path: Path) -> None:
    model = drawn(FAMILIES[family])
    checkpoints.gguf_file(model, tmp_path / "small.gguf")
    for source in (tmp_path / "small.gguf", tmp_path):
        spec = weights.spec_for(str(source))
        assert (spec.architecture, spec.hyperparameters["max_length"]) == ("causal_decoder", 64)
        assert str(tmp_path) not in str(spec.hyperparameters)
        assert agrees(loaded(str(source)), model)


def test_quantized_tensors_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    model = drawn(FAMILIES["llama"])
    checkpoints.gguf_file(model, tmp_path / "small.gguf", quantized=gguf.GGMLQuantizationType.Q8_0)
    network = loaded(str(tmp_path))
    assert not agrees(network, model)
    assert agrees(network, model, 0.1)
    assert agrees(network, AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32))


def test_the_language_of_a_gguf_file_is_in_its_metadata(tmp_path: Path) -> None:
    checkpoints.gguf_file(drawn(FAMILIES["llama"]), tmp_path / "small.gguf")
    found = weights.language_of(str(tmp_path / "small.gguf"))
    assert (found.beginning, found.ends, found.chat_template) == (BEGIN, (END, TURN), TEMPLATE)
    tokenizer = Tokenizer.from_str(found.tokenizer.decode())
    assert tokenizer.encode(TEXT).ids == checkpoints.tokenizer().encode(TEXT).ids
    checkpoints.gguf_file(drawn(FAMILIES["llama"]), tmp_path / "bare.gguf", begins=False, split="smollm")
    bare = weights.language_of(str(tmp_path / "bare.gguf"))
    assert bare.beginning is None
    digits = Tokenizer.from_str(bare.tokenizer.decode()).encode("in 2024").tokens
    assert digits[-4:] == ["2", "0", "2", "4"]
    assert tokenizer.encode("in 2024").tokens[-4:] != digits[-4:], "its merges would put them together"


def test_a_sentencepiece_vocabulary_is_read_from_a_gguf_file(tmp_path: Path) -> None:
    """As Llama 2 and Mistral have it: what is no token is bytes, and a text begins unless the file says otherwise."""
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_name("small")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
    ):
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    words = ["▁", "▁cat", "t", "c", "a", "▁c", "at"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(words))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = weights.language_of(str(tmp_path))
    assert (found.beginning, found.ends, found.chat_template) == (1, (2,), None)
    tokenizer = Tokenizer.from_str(found.tokenizer.decode())
    encoded = tokenizer.encode("cat é\n")
    assert encoded.tokens == ["<s>", "▁cat", "▁", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert tokenizer.decode(encoded.ids) == "cat é\n"


def two_files(folder: Path) -> None:
    (folder / "a.gguf").touch()
    (folder / "b.gguf").touch()


def stretched(folder: Path) -> None:
    extra = {"llama.rope.scaling.type": "yarn"}
    checkpoints.gguf_file(drawn(FAMILIES["llama"]), folder / "small.gguf", extra=extra)


def split_unheard_of(folder: Path) -> None:
    checkpoints.gguf_file(drawn(FAMILIES["llama"]), folder / "small.gguf", split="novel")


def cut(folder: Path) -> None:
    checkpoints.gguf_file(drawn(FAMILIES["llama"]), folder / "small.gguf")
    whole = (folder / "small.gguf").read_bytes()
    (folder / "small.gguf").write_bytes(whole[:2000])


def unknown_family(folder: Path) -> None:
    AutoModelForCausalLM.from_config(
        transformers.GemmaConfig(**{**SMALL, "head_dim": 8}, architectures=["GemmaForCausalLM"])
    ).save_pretrained(folder)


def more_tokens_than_the_model(folder: Path) -> None:
    checkpoints.folder(FAMILIES["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))


def no_tokenizer(folder: Path) -> None:
    drawn(FAMILIES["qwen2"]).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (two_files, r"holds 2 GGUF files, a\.gguf, b\.gguf; name one"),
        (stretched, "its rotation is stretched .yarn.*give the Hugging Face folder"),
        (split_unheard_of, "splits words the way 'novel', which is not known"),
        (cut, r"small\.gguf is no GGUF file that can be read"),
        (unknown_family, "is a gemma, a decoder of a family that is not known; known are gpt2, llama"),
        (more_tokens_than_the_model, r"its tokenizer has a token \d+, and the model 200 tokens"),
        (no_tokenizer, "no tokenizer beside them|no fast tokenizer"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(make: object, words: str, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path)

    def read() -> None:
        weights.spec_for(str(tmp_path))
        weights.language_of(str(tmp_path))

    with pytest.raises(ValueError, match=words):
        read()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*small\.gguf"):
        weights.spec_for(str(tmp_path / "small.gguf"))


def test_a_context_may_be_shorter_and_not_longer_than_the_decoders(tmp_path: Path) -> None:
    checkpoints.folder(FAMILIES["llama"], tmp_path)

    def spec(length: int) -> ModelSpec:
        given = {"max_length": length}
        return weights.complete(ModelSpec(architecture="causal_decoder", weights=str(tmp_path), hyperparameters=given))

    assert spec(16).hyperparameters["max_length"] == 16
    with pytest.raises(ValueError, match="65 tokens, but the decoder reads at most 64"):
        spec(65)


def test_texts_alone_may_be_read_by_a_decoder(tmp_path: Path) -> None:
    checkpoints.folder(FAMILIES["llama"], tmp_path)
    spec = weights.complete(ModelSpec(architecture="text_encoder", weights=str(tmp_path)))
    assert spec.hyperparameters["config"]["model_type"] == "llama"


@pytest.mark.slow
def test_the_packaged_decoder_knows_a_capital() -> None:
    network = loaded("smollm2-135m-instruct")
    language = weights.language_of("smollm2-135m-instruct")
    assert (language.beginning, language.ends) == (None, (2,))
    tokenizer = Tokenizer.from_str(language.tokenizer.decode())
    ids = tokenizer.encode("The capital of France is").ids
    with torch.no_grad():
        answer = network(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))["logits"][0, -1]
    assert tokenizer.decode([int(answer.argmax())]) == " Paris"
