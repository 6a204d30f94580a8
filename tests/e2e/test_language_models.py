"""SmolLM2-135M-Instruct, exported as its checkpoint is, chats with OpenAI's client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.settings import Settings
from tests.server.conftest import Live, running

pytestmark = pytest.mark.slow

PARIS = "What is the capital of France?"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 30}, "population": {"type": "integer"}},
    "required": ["city", "population"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def live(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home = tmp_path_factory.mktemp("home")
    with running(Settings(home=home, repository=smollm2, port=0, worker=False, generation_context=512)) as server:
        yield server


def ask(client: openai.OpenAI, text: str = PARIS, **more: Any) -> Any:
    asked: Any = {"temperature": 0, "max_tokens": 40, "messages": [{"role": "user", "content": text}], **more}
    return client.chat.completions.create(model="smollm2", **asked)


def test_it_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_it_reads_a_chat_as_transformers_does(live: Live) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = live.settings.repository / "smollm2" / "1"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüß Gott! 猫?"},
        {"role": "assistant", "content": "Miau."},
        {"role": "user", "content": "And in code:\n\n    print(1)  # <|im_end|>"},
    ]
    for chat in (messages, messages[1:2]):
        found = live.client.post("/v1/tokenize", json={"model": "smollm2", "messages": chat}).json()["tokens"]
        template = (folder / "chat_template.jinja").read_text()
        expected = tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=True)
        assert found == list(expected["input_ids"] if hasattr(expected, "keys") else expected)


@pytest.mark.parametrize(
    "more", [{}, {"temperature": 0.8, "seed": 7, "n": 3}, {"stop": ["Paris"], "logprobs": True, "top_logprobs": 3}]
)
def test_a_stream_is_the_answer(client: openai.OpenAI, more: dict[str, Any]) -> None:
    whole = ask(client, **more)
    texts: dict[int, str] = {}
    tokens: list[str] = []
    for event in ask(client, stream=True, **more):
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.delta.content
            if choice.logprobs is not None:
                tokens += [token.token for token in choice.logprobs.content]
    assert sorted(texts.values()) == sorted(choice.message.content for choice in whole.choices)
    if "logprobs" in more:
        assert tokens == [token.token for token in whole.choices[0].logprobs.content]
        assert "Paris" not in texts[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_it_answers_fits_a_schema(client: openai.OpenAI, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
    words = "Tell me the largest city of France and how many people live there, as JSON."
    answer = ask(client, words, response_format=form, temperature=temperature, seed=1, max_tokens=120)
    assert answer.choices[0].finish_reason == "stop"
    city = json.loads(answer.choices[0].message.content)
    assert city.keys() == {"city", "population"}
    assert isinstance(city["population"], int)


def test_streams_that_are_left_free_their_slots(live: Live) -> None:
    engine = live.repository.models["smollm2"].engine
    assert engine is not None
    asked = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me a long story."}], "stream": True}
    for _ in range(6):
        with live.client.stream("POST", "/v1/chat/completions", json={**asked, "n": 4}) as response:
            next(response.iter_bytes())
    with pytest.raises(httpx.ReadTimeout):
        live.client.post("/v1/chat/completions", json={**asked, "stream": False}, timeout=0.5)
    end = time.perf_counter() + 10
    while engine.occupancy().running or engine.depth():
        assert time.perf_counter() < end, "nobody waits for what is written"
        time.sleep(0.05)
