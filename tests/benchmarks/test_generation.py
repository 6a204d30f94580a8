"""The measurements of generation: what is made of scripted streams, and who is compared with whom."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from benchmarks.generation.contenders import loop
from benchmarks.generation.document import Conditions, pictures, write
from benchmarks.generation.figures import BARE, OURS, TRANSFORMERS, aims, figures
from benchmarks.generation.measured import Answer, Measured
from benchmarks.generation.prompts import LONGEST, SHORTEST, Prompt, Prompts
from benchmarks.generation.streams import timed_events
from export.decoder import write_decoder
from tests.models import checkpoints


def chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


def event(text: str, end: bytes = b"\n\n") -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + end


def said(pieces: list[tuple[float, bytes]]) -> list[tuple[float, Any]]:
    return [(when, found["choices"][0]["text"]) for when, found in timed_events(pieces)]


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_an_event_is_timed_by_its_last_byte(end: bytes) -> None:
    first, second = event("Pa", end), event("ris", end)
    cut = chunk(first)[:20]
    pieces = [
        (1.0, HEAD + cut),  # a chunk that comes in two pieces
        (2.0, chunk(first)[20:]),
        (3.0, chunk(second[:9])),  # an event that comes in two chunks
        (4.0, chunk(second[9:]) + chunk(event("!", end) + b"data: [DONE]" + end) + chunk(b"")),
    ]
    assert said(pieces) == [(2.0, "Pa"), (4.0, "ris"), (4.0, "!")]


def test_every_cut_of_a_stream_gives_the_same_events() -> None:
    whole = HEAD + b"".join(chunk(event(word)) for word in ("one", " tĕn", " more")) + chunk(b"")
    for place in range(len(whole)):
        found = said([(1.0, whole[:place]), (2.0, whole[place:])])
        assert [text for _, text in found] == ["one", " tĕn", " more"]
        assert [when for when, _ in found] == sorted(when for when, _ in found)


def test_a_refusal_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="429"):
        list(timed_events([(1.0, b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}")]))


def rounds(*rates: float, tokens: int = 10) -> list[Measured]:
    """One answer a round, at so many tokens a second."""
    return [
        Measured(tokens, tokens / rate, [Answer(0.1, tokens / rate, f"answer {i}")]) for i, rate in enumerate(rates)
    ]


def test_ratios_are_those_of_the_same_rounds() -> None:
    measured = {
        (OURS, 1): rounds(40, 10, 40),  # the machine was slow in the second round, for both
        (TRANSFORMERS, 1): rounds(10, 2.5, 10),
        (OURS, 16): rounds(90, 90, 90),
        (BARE, 16): rounds(100, 100, 100),
        ("one peer", 16): rounds(60, 60, 60),
        ("another", 16): rounds(100),  # slow to measure: in the first round only
    }
    found = {one.words: one for one in aims(measured, [TRANSFORMERS, "one peer", "another"])}
    assert found["transformers, one stream"].ratio == pytest.approx(4.0)
    assert found["transformers, one stream"].met
    assert found["the bare loop, 16 streams"].ratio == pytest.approx(0.9)
    assert found["the fastest peer, 16 streams"].other == "another"
    assert not found["the fastest peer, 16 streams"].met
    assert "the fastest peer, 32 streams" not in found


def test_figures_are_medians_and_say_whose_text_is_the_same() -> None:
    measured = {(OURS, 1): rounds(40, 10, 20), (TRANSFORMERS, 1): rounds(5, 5, 5)}
    measured[OURS, 1][0].answers[0] = Answer(0.3, 0.5, "something else")
    mine = figures(measured)[0]
    assert (mine.contender, mine.rate, mine.slowest, mine.fastest) == (OURS, 20, 10, 40)
    assert mine.first == pytest.approx(100)
    assert mine.per_token == pytest.approx(1e3 * (0.5 - 0.1) / 9)  # the median of the three
    assert mine.alike == pytest.approx(2 / 3)


def test_the_document_says_what_is_not_met_and_what_was_not_measured() -> None:
    measured = {(OURS, 1): rounds(30, 30), (TRANSFORMERS, 1): rounds(10, 10), (OURS, 16): rounds(95, 95)}
    measured[BARE, 16] = rounds(100, 100)
    run = Conditions(
        cores=2,
        memory_gib=4,
        minutes=1,
        rounds=2,
        tokens=10,
        alone=1,
        settings={OURS: "our server"},
        missing={"a peer": "it cannot be installed here"},
        versions={"torch": "2"},
    )
    found = figures(measured)
    text = write(found, aims(measured, [TRANSFORMERS]), pictures(found), run)
    assert "| transformers, one stream | transformers | ≥ 3.5 | **3.00** | **no** |" in text
    assert "| the bare loop, 16 streams | the bare loop | ≥ 0.9 | **0.95** | yes |" in text
    assert "not measured: a peer: it cannot be installed here" in text
    assert "(generation/streams.png)" in text


@pytest.mark.slow
def test_the_bare_loop_and_transformers_generate_the_same_tokens(tmp_path: Path) -> None:
    model = checkpoints.drawn(checkpoints.llama(128, pad_token_id=0, eos_token_id=2))
    model.save_pretrained(tmp_path / "checkpoint")
    network = checkpoints.network_of(model, 128)
    write_decoder(network.parts(), tmp_path / "model.onnx")
    random = torch.Generator().manual_seed(0)
    batch = [Prompt("", torch.randint(3, 300, [length], generator=random).tolist()) for length in (5, 20, 11)]
    said = {}
    for module, folder in (("bare_loop", tmp_path), ("transformers_loop", tmp_path / "checkpoint")):
        with loop(module, Path(sys.executable), module, [str(folder), "1", "2"], str) as contender:
            alone = contender.measure([[prompt] for prompt in batch], 12)
            together = contender.measure([batch], 12)
        assert len(together.answers) == 3
        assert together.seconds > 0
        assert all(0 < answer.first < answer.last <= together.seconds for answer in together.answers)
        said[module] = [answer.text for answer in (*alone.answers, *together.answers)]
    assert said["bare_loop"] == said["transformers_loop"]
    assert said["bare_loop"][:3] == said["bare_loop"][3:]


def test_prompts_have_all_lengths_and_never_come_again() -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator(["the value of an expression"], BpeTrainer(vocab_size=300, show_progress=False))
    prompts = Prompts(tokenizer)
    found = [prompt for _ in range(2) for batch in prompts.batches(16, 3) for prompt in batch]
    lengths = [len(prompt.tokens) for prompt in found]
    assert min(lengths) <= SHORTEST + 2
    assert max(lengths) >= LONGEST - 2
    assert len({prompt.text[:20] for prompt in found}) == len(found)
    assert [len(batch) for batch in prompts.batches(1, 3)] == [1, 1, 1]
