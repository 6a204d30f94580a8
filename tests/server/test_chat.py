"""POST /v1/chat/completions over a real socket, asked by OpenAI's client, of language models that are tables."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.settings import Settings
from tests.server.chains import publish_language_model, publish_letters, publish_translation
from tests.server.conftest import Live, Start, message_of, running

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Blaise"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home = tmp_path_factory.mktemp("home")
    limits = Settings(home=home, port=0, worker=False, generation_context=50_000, generation_slots=4, queue_limit=8)
    publish_language_model(limits.repository)
    publish_language_model(limits.repository, "endless", max_length=50_000, ends=False)
    publish_language_model(limits.repository, "plain", template=None)
    publish_letters(limits.repository)
    publish_translation(limits.repository)
    with running(limits) as server:
        yield server


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def ask(client: openai.OpenAI, text: str = "today", model: str = "tales", **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=user(text), **{"temperature": 0, **more})


def test_a_chat_is_answered_in_openais_shape(client: openai.OpenAI) -> None:
    answer = ask(client)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "cat sleeps today")
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    # [BOS] today the
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.id.startswith("chatcmpl-")


def test_messages_of_all_kinds_are_rendered(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "the cat"}, {"type": "text", "text": "sleeps"}]
    messages: Any = [
        {"role": "developer", "content": "the"},
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": "today", "tool_calls": []},
        {"role": "tool", "content": "dog", "tool_call_id": "call-1"},
    ]
    answer = client.chat.completions.create(model="tales", messages=messages, temperature=0)
    assert answer.choices[0].message.content == "cat sleeps today"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 1 + 6 + 1


def test_an_answer_is_as_long_as_the_context_unless_it_is_told_otherwise(client: openai.OpenAI) -> None:
    whole = ask(client, model="letters", logit_bias={"97": 100})
    assert whole.usage.total_tokens == 512
    assert whole.choices[0].finish_reason == "length"
    for field in ("max_tokens", "max_completion_tokens"):
        assert ask(client, model="letters", logit_bias={"97": 100}, **{field: 5}).choices[0].message.content == "aaaaa"


def test_a_stream_begins_with_the_role_and_ends_with_the_usage(client: openai.OpenAI) -> None:
    first, *events, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(event.choices[0].delta.content for event in events) == "cat sleeps today"
    assert [event.choices[0].finish_reason for event in events if event.choices[0].finish_reason] == ["stop"]
    assert events[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], 3, 3)
    assert {event.object for event in events} == {"chat.completion.chunk"}
    assert len({event.id for event in (first, *events, last)}) == 1
    assert first.system_fingerprint == ask(client).system_fingerprint


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_have_their_index(client: openai.OpenAI, stream: bool) -> None:
    found = ask(client, n=3, stream=stream, temperature=1, seed=4)
    texts = dict.fromkeys(range(3), "")
    if stream:
        roles = [
            event.choices[0].index for event in found if (texts := add(texts, event)) and event.choices[0].delta.role
        ]
        assert sorted(roles) == [0, 1, 2]
    else:
        texts = {choice.index: choice.message.content for choice in found.choices}
    assert all(re.fullmatch("(cat|dog) sleeps today", text) for text in texts.values())


def add(texts: dict[int, str], event: Any) -> dict[int, str]:
    for choice in event.choices:
        texts[choice.index] += choice.delta.content
    return texts


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI, stream: bool) -> None:
    answer = ask(client, model="endless", stop=["today the"], stream=stream)
    if not stream:
        assert answer.choices[0].message.content == "cat sleeps "
        return
    events = list(answer)
    assert "".join(event.choices[0].delta.content for event in events) == "cat sleeps "
    assert events[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_have_their_bytes_and_others(client: openai.OpenAI, stream: bool) -> None:
    found = ask(client, logprobs=True, top_logprobs=2, stream=stream)
    parts = [event.choices[0].logprobs for event in found] if stream else [found.choices[0].logprobs]
    tokens = [token for part in parts if part is not None for token in part.content]
    assert [token.token for token in tokens] == ["cat", "sleeps", "today"]
    assert [token.logprob for token in tokens] == pytest.approx([-0.2877, 0, 0], abs=1e-3)
    assert tokens[0].bytes == list(b"cat")
    assert [(other.token, round(other.logprob, 3)) for other in tokens[0].top_logprobs] == [
        ("cat", -0.288),
        ("dog", -1.386),
    ]


def test_the_bytes_of_a_character_in_pieces(client: openai.OpenAI) -> None:
    form = {"type": "regex", "pattern": "猫"}
    content = (
        ask(client, model="letters", logprobs=True, extra_body={"response_format": form}).choices[0].logprobs.content
    )
    assert [token.bytes for token in content] == [[byte] for byte in "猫".encode()]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_answered_fits_the_schema(client: openai.OpenAI, stream: bool) -> None:
    for seed in range(3):
        found = ask(client, model="letters", temperature=1, seed=seed, response_format=SCHEMA, stream=stream)
        if stream:
            text = "".join(event.choices[0].delta.content for event in found)
        else:
            text = found.choices[0].message.content
        person = json.loads(text)
        assert person.keys() == {"name", "age"}
        assert person["name"] in ("Ada", "Blaise")
        assert person["age"] in range(100)


def test_json_and_what_a_pattern_matches(client: openai.OpenAI) -> None:
    # The letters are drawn with an even hand, so the object is cut off, but it begins as one.
    found = ask(client, model="letters", temperature=1, seed=1, response_format={"type": "json_object"}, max_tokens=40)
    assert found.choices[0].message.content.lstrip().startswith("{")
    form = {"type": "regex", "pattern": "(cat|dog) [0-9]{3}"}
    found = ask(client, model="letters", temperature=1, extra_body={"response_format": form})
    assert re.fullmatch("(cat|dog) [0-9]{3}", found.choices[0].message.content)
    assert found.choices[0].finish_reason == "stop"
    form = {"type": "choice", "choices": ["gut", "schlecht", "größer"]}
    drawn = ask(client, model="letters", temperature=1, n=12, extra_body={"response_format": form}).choices
    assert {choice.message.content for choice in drawn} <= {"gut", "schlecht", "größer"}
    assert {choice.finish_reason for choice in drawn} == {"stop"}
    assert ask(client, response_format={"type": "text"}).choices[0].message.content == "cat sleeps today"


def test_what_changes_nothing_is_taken(client: openai.OpenAI) -> None:
    more: Any = {
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
        "store": False,
        "user": "x",
        "metadata": {},
    }
    assert ask(client, **more, service_tier="auto", parallel_tool_calls=True).choices[0].finish_reason == "stop"


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "plain"}, "model", "chat template; ask it at /v1/completions"),
    ({"model": "german"}, "model", "/v1/completions"),
    ({"messages": []}, "messages", ">= 1"),
    ({"messages": "the"}, "messages", "array"),
    ({"messages": [{"content": "the"}]}, "messages", "role"),
    ({"messages": [{"role": "user"}]}, "messages", "messages[0].content"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", "no systems here"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "'image_url'"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", "content[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages", "tool_calls"),
    ({"tools": [{"type": "function"}]}, "tools", "not offered"),
    ({"tool_choice": "required"}, "tool_choice", "not offered"),
    ({"functions": [{}]}, "functions", "not offered"),
    ({"modalities": ["audio", "text"]}, "modalities", "text"),
    ({"audio": {"voice": "x"}}, "audio", "text"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
    ({"n": 17}, "n", "<= 16"),
    ({"temperature": 3}, "temperature", "<= 2"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "schema"),
    ({"response_format": {"type": "json_object"}}, "response_format", "whole words"),
    ({"model": "letters", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
     "response_format", "schema"),
    ({"model": "letters", "response_format": {"type": "regex", "pattern": "(?=x)"}}, "response_format", "regular"),
    ({"model": "letters", "response_format": {"type": "choice", "choices": []}}, "response_format", "length >= 1"),
    ({"logit_bias": {"the": 1}}, "logit_bias", "'the'"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", ">= 1"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_wrong_names_its_field(
    live: Live, body: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    if "stream_options" in body and stream:
        return
    asked = {"model": "tales", "messages": user("the"), "stream": stream, **body}
    answer = live.client.post("/v1/chat/completions", json=asked)
    assert words in message_of(answer, 400)
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("text", "more", "numbers", "param"),
    [
        ("the " * 70, {}, ("64", "72"), "messages"),
        ("the", {"max_tokens": 62}, ("64", "3", "62"), "max_tokens"),
        ("the", {"max_completion_tokens": 62}, ("64", "3", "62"), "max_completion_tokens"),
    ],
)
def test_more_than_the_context(
    client: openai.OpenAI, text: str, more: dict[str, Any], numbers: tuple[str, ...], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, text, **more)
    assert raised.value.code == "context_length_exceeded"
    assert raised.value.param == param
    for number in numbers:
        assert re.search(rf"\b{number}\b", raised.value.message)


def test_openais_client_is_told_of_every_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'absent'"):
        ask(client, model="absent")
    with pytest.raises(openai.APIStatusError) as raised:
        ask(client, extra_headers={"x-request-timeout": "1e-9"})
    assert raised.value.status_code == 408


def idle(live: Live, name: str) -> None:
    model = live.repository.models[name]
    assert model.engine is not None
    end = time.perf_counter() + 5
    while model.engine.occupancy().running or model.engine.depth() or model.requests:
        assert time.perf_counter() < end, "the engine goes on"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_not_done_in_time_is_given_up(live: Live, stream: bool) -> None:
    asked = {"model": "endless", "messages": user("the"), "stream": stream}
    answer = live.client.post("/v1/chat/completions", json=asked, headers={"x-request-timeout": "0.2"})
    if stream:
        assert answer.status_code == 200
        *events, last, rest = answer.text.split("\n\n")
        assert len(events) > 1
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert rest == ""
    else:
        assert "0.2 s" in message_of(answer, 408)
    idle(live, "endless")


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_gives_the_slots_back(live: Live, stream: bool) -> None:
    asked = {"model": "endless", "messages": user("the"), "stream": stream, "n": 2}
    if stream:
        with live.client.stream("POST", "/v1/chat/completions", json=asked) as response:
            next(response.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            live.client.post("/v1/chat/completions", json=asked, timeout=0.2)
    idle(live, "endless")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_when_to_come_back(live: Live, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(live.repository.models["tales"].engine, "queue_limit", 0)
    asked = {"model": "tales", "messages": user("the"), "stream": stream}
    rejected = live.server.application.state.metrics.rejected
    before = rejected["tales", "queue_full"]
    answer = live.client.post("/v1/chat/completions", json=asked)
    assert "no room" in message_of(answer, 429)
    assert int(answer.headers["retry-after"]) >= 1
    assert rejected["tales", "queue_full"] == before + 1


def test_the_context_is_told_with_the_model(client: openai.OpenAI) -> None:
    lengths = {model.id: getattr(model, "max_model_len", None) for model in client.models.list()}
    assert (lengths["tales"], lengths["letters"], lengths["german"]) == (64, 512, None)
    assert client.models.retrieve("endless").model_dump()["max_model_len"] == 50_000


def test_a_server_that_stops_ends_what_it_has_begun(start: Start, tmp_path: Path) -> None:
    publish_language_model(tmp_path / "repository", "endless", max_length=9_000, ends=False)
    live = start(generation_context=9_000)
    asked = {"model": "endless", "messages": user("the"), "stream": True, "max_tokens": 5_000}
    with live.client.stream("POST", "/v1/chat/completions", json=asked) as response:
        chunks = response.iter_text()
        whole = next(chunks)
        live.server.should_exit = True
        whole += "".join(chunks)
    assert whole.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in whole


def test_a_newer_version_comes_while_an_answer_is_written(live: Live) -> None:
    publish_language_model(live.settings.repository, "swapped", max_length=20_000, ends=False)
    end = time.perf_counter() + 10
    while "swapped" not in live.repository.models:
        assert time.perf_counter() < end
        time.sleep(0.01)
    old = live.repository.models["swapped"]
    asked = {"model": "swapped", "messages": user("the"), "stream": True, "max_tokens": 9_000}
    with live.client.stream("POST", "/v1/chat/completions", json=asked) as response:
        chunks = response.iter_text()
        first = next(chunks)
        publish_language_model(live.settings.repository, "swapped")
        while live.repository.models["swapped"] is old:
            assert time.perf_counter() < end
            time.sleep(0.01)
        whole = first + "".join(chunks)
    assert whole.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in whole
    engine = old.engine
    assert engine is not None
    while not engine.closed:
        assert time.perf_counter() < end + 10
        time.sleep(0.01)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PATTERNS = st.sampled_from(["a{3}", "(", "[a-z]*", "", "\\1", "(?i)x", ".{2,3}$", "^$", "\\p{Lu}"])
SCHEMAS = st.dictionaries(
    st.sampled_from(["type", "properties", "items", "enum", "const", "$ref", "anyOf", "maxLength", "pattern"]),
    ANYTHING | st.sampled_from(["object", "string", "#"]),
    max_size=3,
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 300),
    "min_p": st.floats(0, 1),
    "n": st.integers(0, 5),
    "seed": st.integers(),
    "stop": st.lists(st.text(max_size=2), max_size=5),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0, 3),
    "logit_bias": st.dictionaries(st.integers(-1, 260).map(str), st.integers(-100, 100), max_size=3),
    "min_tokens": st.integers(0, 30),
    "max_completion_tokens": st.integers(0, 30),
    "max_tokens": st.integers(0, 600),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "response_format": st.one_of(
        st.fixed_dictionaries({"type": st.just("regex"), "pattern": PATTERNS}),
        st.fixed_dictionaries(
            {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": SCHEMAS})}
        ),
        st.just({"type": "json_object"}),
    ),
    "tools": st.just([]),
    "user": st.text(max_size=3),
}


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    likely=st.fixed_dictionaries({}, optional=LIKELY),
    odd=st.dictionaries(st.sampled_from(["messages", *LIKELY]), ANYTHING, max_size=1),
    turns=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=9)}),
        min_size=1,
        max_size=3,
    ),
    stream=st.booleans(),
)
def test_whatever_is_asked_is_answered_or_refused(
    live: Live, likely: dict[str, Any], odd: dict[str, Any], turns: list[Any], stream: bool
) -> None:
    body = {"model": "letters", "messages": turns, "stream": stream, "max_tokens": 9, **likely, **odd}
    answer = live.client.post("/v1/chat/completions", content=json.dumps(body))
    if answer.status_code != 200:
        message_of(answer, 400)
    elif "text/event-stream" in answer.headers["content-type"]:
        assert answer.text.endswith("data: [DONE]\n\n"), answer.text[-500:]
    else:
        assert answer.json()["choices"]
