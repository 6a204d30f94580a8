"""POST /v1/tokenize and /v1/detokenize, of models that read texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from server.settings import Settings
from tests.server.bundles import publish_texts, publish_vectors
from tests.server.chains import BEGIN, END, publish_language_model, publish_letters, publish_translation
from tests.server.conftest import Live, message_of, running


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False)
    publish_language_model(settings.repository)
    publish_language_model(settings.repository, "plain", template=None)
    publish_letters(settings.repository)
    publish_translation(settings.repository)
    publish_texts(settings.repository)
    publish_vectors(settings.repository)
    with running(settings) as server:
        yield server


def ask(live: Live, path: str = "tokenize", **body: Any) -> Any:
    answer = live.client.post(f"/v1/{path}", json={"model": "tales", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_text_is_read_as_a_completion_reads_it(live: Live) -> None:
    found = ask(live, prompt="the cat")
    assert found == {"count": 3, "max_model_len": 64, "tokens": [BEGIN, 4, 5], "token_strs": None}
    assert ask(live, prompt="the cat", add_special_tokens=False)["tokens"] == [4, 5]
    answer = live.client.post("/v1/completions", json={"model": "tales", "prompt": "the cat"}).json()
    assert answer["usage"]["prompt_tokens"] == found["count"]
    assert ask(live, prompt="", add_special_tokens=False)["count"] == 0


def test_messages_are_read_as_a_chat_reads_them(live: Live) -> None:
    messages = [{"role": "user", "content": "dog"}]
    found = ask(live, messages=messages)
    assert found["tokens"] == [BEGIN, 6, 4]
    answer = live.client.post("/v1/chat/completions", json={"model": "tales", "messages": messages}).json()
    assert answer["usage"]["prompt_tokens"] == found["count"]
    assert ask(live, messages=messages, add_generation_prompt=False)["tokens"] == [BEGIN, 6]


def test_what_tokens_stand_for(live: Live) -> None:
    assert ask(live, prompt="the cat", return_token_strs=True)["token_strs"] == ["[BOS]", "the", "cat"]
    assert ask(live, model="letters", prompt="né", return_token_strings=True)["token_strs"] == ["n", "\ufffd", "\ufffd"]


@pytest.mark.parametrize("text", ["", "né 猫<end>", "a" * 3000])
def test_tokens_are_as_good_as_their_text(live: Live, text: str) -> None:
    found = ask(live, model="letters", prompt=text)
    assert found["max_model_len"] == 512
    assert ask(live, "detokenize", model="letters", tokens=found["tokens"]) == {"prompt": text}


@pytest.mark.parametrize("words", [1, 13, 15, 40])
def test_a_translation_reads_texts_between_its_ends(live: Live, words: int) -> None:
    found = ask(live, model="german", prompt="cat " * words)
    assert found["tokens"] == [BEGIN, *[5] * words, END]
    assert found["max_model_len"] == 16


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("tokenize", {}, "prompt", "either a prompt or messages"),
    ("tokenize", {"prompt": "the", "messages": [{"role": "user", "content": "x"}]}, "prompt", "either"),
    ("tokenize", {"prompt": ["the"]}, "prompt", "str"),
    ("tokenize", {"messages": []}, "messages", ">= 1"),
    ("tokenize", {"messages": [{"role": "system", "content": "x"}]}, "messages", "no systems here"),
    ("tokenize", {"model": "plain", "messages": [{"role": "user", "content": "x"}]}, "messages", "chat template"),
    ("tokenize", {"model": "german", "messages": [{"role": "user", "content": "x"}]}, "messages", "does not chat"),
    ("tokenize", {"model": "points", "prompt": "x"}, "model", "reads no texts"),
    ("detokenize", {"model": "points", "tokens": [1]}, "model", "reads no texts"),
    ("detokenize", {"tokens": [9]}, "tokens", "0 to 8"),
    ("detokenize", {"tokens": [-1]}, "tokens", "0 to 8"),
    ("detokenize", {"tokens": "the"}, "tokens", "array"),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), WRONG)
def test_a_request_that_is_wrong_names_its_field(
    live: Live, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    answer = live.client.post(f"/v1/{path}", json={"model": "tales", **body})
    assert words in message_of(answer, 400)
    assert answer.json()["error"]["param"] == param
