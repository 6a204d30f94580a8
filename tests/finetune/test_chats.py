"""Learning from conversations: which tokens are learned, texts packed into rows, and whole runs."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from export.bundle import CHAT_TEMPLATE
from export.processing.chat import Message, render
from export.processing.inputs import BadInput, TextInput
from finetune import trainer
from finetune.automatic import Chosen
from finetune.chat_tokens import CHATML, START, ChatTokens, Row
from finetune.data.chats import Completion, Conversation
from finetune.data.datasets import open_dataset
from finetune.data.wanted import CHATS, NOTHING
from finetune.evaluate import evaluate, report
from finetune.objectives.next_token import NextToken
from finetune.packing import pack
from finetune.preprocess import Items, prepare
from finetune.recipe import Data, Hyperparameters, Recipe
from finetune.run import Cancelled, JobFailed, RunRequest, run
from finetune.trainer import FitResult
from finetune.vocabulary import BOS, EOS, PAD, UNASKED, train_tokenizer
from models import registry
from models.backbones.weights import language_of
from models.network import Network
from models.spec import LanguageModel, ModelSpec
from tests.finetune.small import Recorder, differing, weights
from tests.finetune.test_language_models import VOCABULARY, items_of, rows
from tests.finetune.test_run import file
from tests.models.narrow import TRANSFORMER

TOKENIZER = train_tokenizer(["user assistant system Hi there Hello you Bye"] * 3, 340, more=(START,))
READ = Tokenizer.from_str(TOKENIZER.decode())
SPEC = TextInput(max_length=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}{% endfor %}"
)
# Thoughts of all answers but the last are left out.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ASKING_OTHERWISE = CHATML.replace("<|im_start|>assistant\\n'", "<|im_start|>assistant\\nLet me think. '")


def chat(*texts: str, silent: tuple[int, ...] = (), system: str | None = None) -> Conversation:
    """Turns of user and assistant; the answers of these numbers are not learned."""
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    learned = [i % 2 == 1 and i not in silent for i in range(len(texts))]
    if system is not None:
        messages, learned = [Message("system", system), *messages], [False, *learned]
    return Conversation(tuple(messages), tuple(learned))


def read(template: str | None, *, ends: tuple[int, ...] = (EOS,), spec: TextInput = SPEC) -> ChatTokens:
    return ChatTokens(spec, TOKENIZER, template, ends)


def in_words(row: Row, tokenizer: Tokenizer = READ) -> list[tuple[bool, str]]:
    """The runs of tokens that are learned and that are not, as text."""
    assert len(row.tokens) == len(row.targets)
    assert (row.targets[row.targets != UNASKED] == row.tokens[row.targets != UNASKED]).all()
    runs = groupby(zip(row.tokens.tolist(), row.targets.tolist(), strict=True), lambda pair: pair[1] != UNASKED)
    return [
        (learned, tokenizer.decode([token for token, _ in run], skip_special_tokens=False)) for learned, run in runs
    ]


def test_what_the_assistant_says_is_learned_with_the_end_of_its_turn() -> None:
    (row,) = read(CHATML).rows(chat("Hi", "Hello there", "Bye", "Bye you", system="Be kind"))
    assert in_words(row) == [
        (False, "<|im_start|>system\nBe kind[EOS]\n<|im_start|>user\nHi[EOS]\n<|im_start|>assistant\n"),
        (True, "Hello there[EOS]"),
        (False, "\n<|im_start|>user\nBye[EOS]\n<|im_start|>assistant\n"),
        (True, "Bye you[EOS]"),
        (False, "\n"),
    ]


LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "end", "asked", "between", "behind"),
    [
        (
            LLAMA3,
            "<|eot_id|>",
            "[BOS]<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            [],
        ),
        (
            GEMMA,
            "<end_of_turn>",
            "[BOS]<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
            "\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
            [(False, "\n")],
        ),
    ],
)
def test_published_templates_end_a_turn_by_a_token_of_their_own(
    template: str, end: str, asked: str, between: str, behind: list[tuple[bool, str]]
) -> None:
    tokenizer = train_tokenizer(["user assistant model Hi Hello"] * 3, 340, more=(end,))
    read_by = Tokenizer.from_str(tokenizer.decode())
    chats = ChatTokens(SPEC, tokenizer, template, [EOS, read_by.token_to_id(end)])
    (row,) = chats.rows(chat(" Hi", "Hello there ", "Bye", "Bye you"))
    expected = [(False, asked), (True, f"Hello there{end}"), (False, between), (True, f"Bye you{end}"), *behind]
    assert in_words(row, read_by) == expected


@pytest.mark.slow
def test_smollm2_learns_what_its_own_template_writes() -> None:
    language = language_of("smollm2-135m-instruct", {})
    spec = TextInput(max_length=128, pad_token_id=language.padding, eos_token_id=language.ends[0])
    chats = ChatTokens(spec, language.tokenizer, language.chat_template, language.ends)
    (row,) = chats.rows(chat("Hi", "Hello"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert in_words(row, chats.processor.tokenizer) == [
        (
            False,
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "Hello<|im_end|>"),
        (False, "\n"),
    ]


def test_what_has_weight_0_is_read_and_not_learned() -> None:
    (row,) = read(INST).rows(chat("Hi", "Hello", "Bye", "Bye you", silent=(1,)))
    assert in_words(row) == [(False, "[BOS][INST] Hi [/INST] Hello [EOS][INST] Bye [/INST]"), (True, " Bye you [EOS]")]


def test_a_template_that_writes_answers_otherwise_later_gives_a_row_for_each() -> None:
    rows = read(THINKING).rows(chat("Hi", "<think>Hm</think>Hello", "Bye", "<think>So</think>Bye you"))
    assert [in_words(row) for row in rows] == [
        [(False, "<|im_start|>user\nHi[EOS]<|im_start|>assistant\n"), (True, "<think>Hm</think>Hello[EOS]")],
        [
            (
                False,
                "<|im_start|>user\nHi[EOS]<|im_start|>assistant\nHello[EOS]<|im_start|>user\nBye[EOS]<|im_start|>assistant\n",
            ),
            (True, "<think>So</think>Bye you[EOS]"),
        ],
    ]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (ENDLESS, "ends an answer with none of the tokens that the model ends at"),
        (ASKING_OTHERWISE, r"messages\[1\]: the chat template does not write an answer behind what asks for it"),
        (INST, "refuses these messages: no system"),
        ("{{ messages[0].content", "line 1 of the chat template"),
    ],
)
def test_a_template_that_cannot_be_learned_is_refused_in_words(template: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        read(template).rows(chat("Hi", "Hello", system="Be kind" if template == INST else None))


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<[")), min_size=2, max_size=8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_before_each_answer_stands_what_a_server_reads_and_the_answer_is_whole(texts: list[str], inst: bool) -> None:
    """Whatever is said, white space and letters of several tokens at the boundaries included."""
    told = chat(*(texts[: len(texts) // 2 * 2]))
    template = INST.replace(".strip()", "") if inst else CHATML
    (row,) = read(template).rows(told)
    starts = np.flatnonzero((row.targets != UNASKED) & (np.roll(row.targets, 1) == UNASKED))
    assert len(starts) == len(told.messages) // 2
    for place, start in zip(range(1, len(told.messages), 2), starts, strict=True):
        asked = render(template, told.messages[:place], generate=True, bos="[BOS]", eos="[EOS]")
        before = row.tokens[:start]
        assert READ.decode(before.tolist(), skip_special_tokens=False) == READ.normalizer.normalize_str(asked)
        if place == 1:
            assert before.tolist() == READ.encode(asked, add_special_tokens=False).ids
    whole = render(template, told.messages, generate=False, bos="[BOS]", eos="[EOS]")
    assert READ.decode(row.tokens.tolist(), skip_special_tokens=False) == READ.normalizer.normalize_str(whole)


def test_of_a_prompt_and_a_completion_the_completion_and_the_end_are_learned() -> None:
    (row,) = read(None).rows(Completion("Hi ", " there"))
    assert in_words(row) == [(False, "[BOS]Hi "), (True, " there[EOS]")]
    assert row.tokens[: (row.targets == UNASKED).sum()].tolist() == [
        BOS,
        *READ.encode("Hi ", add_special_tokens=False).ids,
    ]


def conversations(folder: Path, pairs: list[tuple[str, str]], name: str = "chats.jsonl") -> Path:
    path = folder / name
    rows = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
        for one, other in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(path: Path, spec: TextInput, wanted: Any = CHATS) -> Items:
    dataset = open_dataset(path, path.name, Data(), wanted)
    nothing = lambda done, items: None  # noqa: E731
    return prepare(dataset, spec, TOKENIZER, path.parent, nothing, chat_template=CHATML, end_token_ids=[EOS])


def test_what_is_too_long_is_cut_or_left_out_and_counted(tmp_path: Path) -> None:
    pairs = [("Hi", "Hello")] * 18 + [("Hi", "Hello " * 30), ("Hi " * 60, "Hello"), ("Bye", "you")]
    items = prepared(conversations(tmp_path, pairs), msgspec.structs.replace(SPEC, max_length=40))
    assert items.remarks == (
        "2 of 21 conversations are longer than 40 tokens (max_length): 1 are cut, 1 are left out, since nothing to "
        "learn would be left of them",
    )
    assert items.owners is not None
    assert items.owners.tolist() == [*range(19), 20]
    cut = items.select(np.array([18]))
    assert cut.batch_targets(np.array([0]))[0, -1] != EOS, "nobody learns to end in the middle of a sentence"
    assert cut.batch(np.array([0]))["input_ids"].shape == (1, 40)


def test_texts_that_are_read_in_parts_are_counted_too(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", "a long text " * 9)))
    items = prepared(path, msgspec.structs.replace(SPEC, max_length=12), NOTHING)
    assert items.remarks == ("1 of 2 texts are longer than 12 tokens (max_length): learned in parts",)


def test_conversations_that_the_template_refuses_are_left_out_by_name_and_too_many_refused(tmp_path: Path) -> None:
    path = conversations(tmp_path, [("Hi", "Hello")] * 30)
    with path.open("a") as stream:
        told = [{"role": role, "content": "Hi"} for role in ("system", "user", "assistant")]
        stream.write(json.dumps({"messages": told}) + "\n")
    dataset = open_dataset(path, path.name, Data(), CHATS)
    how: dict[str, Any] = {"chat_template": INST, "end_token_ids": [EOS]}
    items = prepare(dataset, SPEC, TOKENIZER, tmp_path, lambda done, items: None, **how)
    assert len(items) == 30
    assert items.remarks == ("left out line 31: the chat template refuses these messages: no system",)
    with pytest.raises(BadInput, match=r"31 of 31 conversations cannot be learned; the first: line 1: .*ends an"):
        prepare(dataset, SPEC, TOKENIZER, tmp_path, lambda done, items: None, **{**how, "chat_template": ENDLESS})


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(60, 300))
def test_packing_loses_nothing_and_no_row_is_too_long(lengths: list[int], most: int) -> None:
    found = pack(lengths, most)
    places = set()
    for row, start, length in zip(found.row, found.start, lengths, strict=True):
        taken = {(row, start + i) for i in range(length)}
        assert not places & taken
        places |= taken
    assert all(row < found.rows and place < found.width <= max(most, 8) for row, place in places)
    for row in range(found.rows):
        segments = [s for s, r in zip(found.segment, found.row, strict=True) if r == row]
        assert sorted(segments) == list(range(1, len(segments) + 1))
    assert found.rows * (found.width - 7) <= max(lengths) * len(lengths), "never worse than a row for each"
    if max(lengths) * 2 < most:
        assert sum(lengths) * 2 > (found.rows - 1) * (found.width - 7), "rows but the last are half full at least"


def network_of(vocabulary: int, seed: int = 0, **more: Any) -> Network:
    torch.manual_seed(seed)
    sizes = {"vocabulary": vocabulary, **TRANSFORMER, "dropout": 0.0, **more}
    return registry.build(ModelSpec(architecture="transformer_decoder", hyperparameters=sizes, task=LanguageModel()))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_packed_texts_have_the_loss_the_gradient_and_the_report_of_texts_row_by_row(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 30, 9)
    tokens = [random.integers(0, 40, length) for length in lengths]
    targets = np.empty(9, object)
    targets[:] = [np.where(random.random(len(row)) < 0.5, row, UNASKED) for row in tokens]
    targets[0][-1] = tokens[0][-1]

    def collate(rows: np.ndarray) -> dict[str, np.ndarray]:
        longest = max(lengths[rows]) + 3
        ids = np.stack([np.pad(tokens[row], (0, longest - lengths[row])) for row in rows])
        mask = np.stack([np.pad(np.ones(lengths[row], np.int64), (0, longest - lengths[row])) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    items = Items(targets, lengths, np.arange(9), collate, padding=UNASKED)
    sizes = np.ones((40, 2), np.int64)
    apart, together = NextToken(targets, sizes), NextToken(targets, sizes, row=64)
    network = network_of(40, seed)
    inputs = [torch.from_numpy(one) for one in items.batch(np.arange(9)).values()]
    inputs[1][:, 1] *= seed % 2  # a word that is left out, or none
    wanted = torch.from_numpy(items.batch_targets(np.arange(9)))
    found = []
    for objective in (apart, together):
        network.zero_grad()
        outputs = objective.outputs(network, inputs, wanted, 0)
        loss = objective.loss(outputs, wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        kept = objective.kept(outputs, wanted)
        found.append((loss.item(), [p.grad.clone() for p in network.parameters() if p.grad is not None], kept))
    (loss, gradients, kept), (packed_loss, packed_gradients, packed_kept) = found
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(gradients, packed_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    for name, value in kept.items():
        torch.testing.assert_close(packed_kept[name], value, rtol=1e-5, atol=1e-5)
    assert report(evaluate(network, items, together, 4, lambda: None), items, together).tokens == sum(
        int((row[1:] != UNASKED).sum()) for row in targets
    )


def fitted(folder: Path, reporter: Recorder) -> tuple[Network, FitResult]:
    """A small decoder that learns packed texts."""
    torch.set_num_threads(1)
    texts = rows([4 + i * 7 % 23 for i in range(40)])
    items = items_of(texts)
    network = network_of(VOCABULARY)
    result = trainer.fit(
        network,
        items.select(np.arange(32)),
        items.select(np.arange(32, 40)),
        NextToken(texts, np.ones((VOCABULARY, 2), np.int64), row=48),
        Recipe(model="small", training_file="small", checkpoint_seconds=0.0, gradient_accumulation=2),
        Chosen(epochs=3, batch_size=4, learning_rate=0.01),
        seed=1,
        run="run",
        folder=folder,
        reporter=reporter,
    )
    return network, result


def test_packed_learning_that_was_interrupted_ends_the_same_in_every_bit(tmp_path: Path) -> None:
    whole, result = fitted(tmp_path / "whole", Recorder())
    with pytest.raises(Cancelled):
        fitted(tmp_path / "killed", Recorder(cancel_at=8))
    again, resumed = fitted(tmp_path / "killed", Recorder())
    assert differing(weights(whole), weights(again)) == set()
    assert resumed.evaluations == result.evaluations
    losses = [one["validation_loss"] for one in result.evaluations]
    assert losses[-1] < losses[0]


PAIRS = [
    (f"What is {a} {b}?", f"{b} {a}!")
    for a in ("one", "two", "red", "sun")
    for b in ("sea", "cat", "sky", "tea", "oak")
]
SMALL = ModelSpec(
    architecture="transformer_decoder",
    hyperparameters={"width": 32, "layers": 2, "heads": 2, "vocabulary_size": 320, "dropout": 0.0},
)


def request(folder: Path, path: Path, name: str = "chat", **fields: Any) -> RunRequest:
    training = file(path)
    quick = Hyperparameters(n_epochs=12, batch_size=4, learning_rate=0.01)
    recipe = Recipe(**{"model": SMALL, "training_file": training.id, "seed": 3, "hyperparameters": quick, **fields})
    return RunRequest(
        recipe=recipe,
        training=training,
        folder=folder / f"run-{name}",
        repository=folder / "repository",
        name=name,
        job_id=name,
    )


@pytest.mark.slow
def test_a_decoder_of_ones_own_learns_to_chat_and_goes_on_from_there(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = conversations(tmp_path, PAIRS)
    reporter = Recorder()
    manifest = run(request(tmp_path, path), reporter)
    assert manifest.lineage.recipe is not None
    assert manifest.task == "language_model"
    assert manifest.generation is not None
    assert manifest.generation.chat_template == CHAT_TEMPLATE
    assert (tmp_path / "repository/chat/1" / CHAT_TEMPLATE).read_text() == CHATML
    assert manifest.metrics["perplexity"] < 0.5 * manifest.metrics["unigram_perplexity"]
    assert "perplexity_before" not in manifest.metrics, "random weights know nothing"
    evaluation = msgspec.json.decode((tmp_path / "repository/chat/1/evaluation.json").read_bytes())
    assert len(evaluation["answers"]) == 2
    assert all(one["prompt"].endswith("assistant\n") for one in evaluation["answers"])
    assert {one["reference"] for one in evaluation["answers"]} <= {answer for _, answer in PAIRS}

    reporter = Recorder()
    again = run(request(tmp_path, path, name="more", model="chat"), reporter)
    assert again.metrics["perplexity_before"] == pytest.approx(manifest.metrics["perplexity"], rel=1e-4)
    assert again.metrics["perplexity"] < again.metrics["perplexity_before"]
    (told,) = [message for _, kind, message in reporter.events if kind == "comparison"]
    tokens = json.loads((tmp_path / "repository/more/1/evaluation.json").read_text())["tokens"]
    before, after = again.metrics["perplexity_before"], again.metrics["perplexity"]
    assert told == f"perplexity {after:.1f} on {tokens} held-out tokens, {before:.1f} before"
    card = (tmp_path / "repository/more/1/MODEL_CARD.md").read_text()
    assert "| before training |" in card
    assert "- model: " in card


@pytest.mark.slow
def test_completions_are_learned_without_a_template(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,completion\n" + "".join(f"{one},{other}\n" for one, other in PAIRS))
    manifest = run(request(tmp_path, path, hyperparameters=Hyperparameters(n_epochs=1, batch_size=8)), Recorder())
    assert manifest.generation is not None
    assert manifest.generation.chat_template is None
    assert not (tmp_path / "repository/chat/1" / CHAT_TEMPLATE).exists()


def test_a_length_that_no_answer_fits_into_fails_in_words(tmp_path: Path) -> None:
    path = conversations(tmp_path, PAIRS)
    with pytest.raises(JobFailed, match="no conversation has anything to learn in its first 4 tokens; give a larger"):
        run(request(tmp_path, path, max_length=4), Recorder())
