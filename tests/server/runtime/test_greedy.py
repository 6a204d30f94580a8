"""Networks as PyTorch runs them, and their graphs in the engine: the same greedy tokens, alone and in a busy batch."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from export.decoder import write_decoder
from export.processing.chat import Message, render
from models import registry
from models.backbones import weights
from models.spec import LanguageModel, ModelSpec
from server.runtime.generation import Engine
from server.runtime.orders import Order
from server.runtime.sampling import Sampling
from server.runtime.slots import GraphSlots
from server.settings import Settings
from tests.models.test_causal_decoder import SMALL as DECODER
from tests.models.test_causal_decoder import VOCABULARY

SMALL = {**DECODER, "max_position_embeddings": 128}
SPECS = {
    "transformer_decoder": ModelSpec(
        architecture="transformer_decoder",
        hyperparameters={"vocabulary": VOCABULARY, "width": 32, "heads": 4, "layers": 2, "max_length": 128},
        task=LanguageModel(),
    ),
    **{
        config.model_type: ModelSpec(
            architecture="causal_decoder", hyperparameters={"config": config.to_dict()}, task=LanguageModel()
        )
        for config in (
            transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
            transformers.MistralConfig(**SMALL, sliding_window=7),
            transformers.Qwen3Config(**SMALL, head_dim=16),
            transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        )
    },
}
NAMES = "France Italy Spain Portugal Germany Poland Austria Greece Norway Sweden Finland Denmark Ireland Japan China "
COUNTRIES = (NAMES + "India Egypt Kenya Peru Chile Cuba Canada Mexico Brazil Turkey").split()


def order(tokens: Sequence[int], max_tokens: int) -> Order:
    return Order(list(tokens), Sampling(max_tokens=max_tokens, temperature=0.0), time.perf_counter() + 3600)


async def alone(slots: GraphSlots, ends: frozenset[int], prompts: Sequence[Sequence[int]], most: int) -> list[Any]:
    """One after the other, each in an engine that has seen nothing."""
    found = []
    for prompt in prompts:
        engine = Engine(slots, ends=ends, text=str, queue_limit=1)
        found.append((await engine.submit(order(prompt, most)).future)[0].tokens)
        engine.close()
        await engine.drain()
    return found


async def busy(slots: GraphSlots, ends: frozenset[int], prompts: Sequence[Sequence[int]], most: int) -> list[Any]:
    """All of them at once, among others that are drawn, and many of which leave early."""
    chance, engine = random.Random(0), Engine(slots, ends=ends, text=str, queue_limit=1000)

    async def disturb(i: int) -> None:
        tokens = [*chance.choice(prompts)[: 5 + i], 3]
        drawn = Sampling(max_tokens=2 * most, n=2, best_of=2, seed=i)
        ticket = engine.submit(Order(tokens, drawn, time.perf_counter() + 3600))
        await asyncio.wait([ticket.future], timeout=chance.random() * 2)
        ticket.future.cancel()

    others = [asyncio.ensure_future(disturb(i)) for i in range(len(prompts) // 3)]
    tickets = [engine.submit(order(prompt, most)) for prompt in prompts]
    found = [(await ticket.future)[0].tokens for ticket in tickets]
    await asyncio.wait(others)
    await engine.drain()
    return found


@pytest.mark.parametrize("name", SPECS)
def test_small_networks(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = registry.build(SPECS[name]).eval()
    for parameter in network.parameters():  # answers that differ from token to token
        parameter.data.mul_(3.0)
    chance = random.Random(1)
    prompts = [[chance.randrange(3, VOCABULARY) for _ in range(chance.choice([1, 4, 9, 40]))] for _ in range(12)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(20):
                logits = network(ids, torch.ones_like(ids))["logits"][:, -1]
                ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)
        expected.append(ids[0, len(prompt) :].tolist())
    assert len({tuple(tokens) for tokens in expected}) > 6
    write_decoder(network.parts(), tmp_path / "model.onnx")
    settings = Settings(providers=["CPUExecutionProvider"], intra_op_threads=1, generation_slots=5)
    slots = GraphSlots(tmp_path / "model.onnx", settings, context=128)
    assert asyncio.run(alone(slots, frozenset(), prompts, 20)) == expected
    assert asyncio.run(busy(slots, frozenset(), prompts, 20)) == expected


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_50_prompts_of_smollm2_equal_transformers_generate(tmp_path: Path) -> None:
    """Half of them sentences to go on with, half of them questions in chats, which begin alike."""
    source, most = "smollm2-135m-instruct", 24
    network = registry.build(msgspec.structs.replace(weights.spec_for(source), task=LanguageModel()))
    weights.load(network, source)
    network.eval()
    language = weights.language_of(source)
    tokenizer = Tokenizer.from_str(language.tokenizer.decode())
    assert language.chat_template is not None
    texts = [f"The capital of {country} is" for country in COUNTRIES]
    for country in COUNTRIES:
        question = [Message(role="user", content=f"Name a river in {country}.")]
        texts.append(render(language.chat_template, question, generate=True, bos="", eos="<|im_end|>"))
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    expected = generated(network.decoder, prompts, most, language.ends)
    write_decoder(network.parts(), tmp_path / "model.onnx")
    del network
    settings = Settings(providers=["CPUExecutionProvider"], generation_slots=16)
    slots = GraphSlots(tmp_path / "model.onnx", settings, context=512)
    ends = frozenset(language.ends)
    assert len(prompts) == 50
    assert asyncio.run(busy(slots, ends, prompts, most)) == expected
    assert asyncio.run(alone(slots, ends, prompts, most)) == expected
    assert "Paris" in tokenizer.decode(expected[0])


def generated(
    model: transformers.PreTrainedModel, prompts: Sequence[Sequence[int]], most: int, ends: Sequence[int]
) -> list[list[int]]:
    """By transformers' generate, prompts of a length together so that nothing is padded."""
    found: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in alike])
        with torch.no_grad():
            answers = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                max_new_tokens=most,
                eos_token_id=list(ends),
                pad_token_id=ends[0],
            )
        for i, answer in zip(alike, answers[:, length:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(answer) if token in ends), len(answer))
            found[i] = answer[:stop]
    return [found[i] for i in range(len(prompts))]
