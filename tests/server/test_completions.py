"""POST /v1/completions over a real socket: a translation and a language model that are tables."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.settings import Settings
from tests.server.bundles import publish_texts
from tests.server.chains import END, publish_language_model, publish_letters, publish_translation
from tests.server.conftest import Live, message_of, running


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False, generation_context=50_000)
    publish_translation(settings.repository)
    publish_language_model(settings.repository)
    publish_language_model(settings.repository, "endless", max_length=50_000, ends=False)
    publish_letters(settings.repository)
    publish_texts(settings.repository)
    with running(settings) as server:
        yield server


def post(live: Live, model: str, prompt: object, **more: object) -> httpx.Response:
    return live.client.post("/v1/completions", json={"model": model, "prompt": prompt, **more})


def ask(live: Live, model: str, prompt: object, **more: object) -> Any:
    response = post(live, model, prompt, **more)
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer: Any) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def test_texts_are_translated_in_their_order(live: Live) -> None:
    answer = ask(live, "german", ["the cat sleeps today", "the dog", "sleeps"])
    assert texts(answer) == ["der Kater schläft heute", "der Hund", "schläft"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    # The source counts with its beginning and end, the answer without.
    assert answer["usage"] == {"prompt_tokens": 6 + 4 + 3, "completion_tokens": 7, "total_tokens": 20}
    assert answer["object"] == "text_completion"
    assert texts(ask(live, "german", "the dog")) == ["der Hund"]


def test_token_ids_are_as_good_as_their_text(live: Live) -> None:
    assert texts(ask(live, "german", [2, 4, 6, END])) == ["der Hund"]
    assert texts(ask(live, "german", [[2, 4, 6, END], [2, 7, END]])) == ["der Hund", "schläft"]
    assert texts(ask(live, "tales", [7])) == ["today"]


def test_beams_and_attention_of_a_translation(live: Live) -> None:
    answer = ask(live, "german", "the dog", beams=3, n=2, attention=True)
    assert len(answer["choices"]) == 2
    best = answer["choices"][0]
    assert best["text"] == "der Hund"
    assert best["attention"]["source"] == ["[BOS]", "the", "dog", "[EOS]"]
    assert best["attention"]["target"] == ["der", "Hund"]
    # What a chain attends with is the token it was fed, and 100 for every step.
    assert best["attention"]["weights"] == [[2.0] * 4, [104.0] * 4]
    assert "attention" not in ask(live, "german", "the dog")["choices"][0]


def test_a_language_model_goes_on(live: Live) -> None:
    answer = ask(live, "tales", "the dog", temperature=0)
    assert (texts(answer), answer["choices"][0]["finish_reason"]) == (["sleeps today"], "stop")
    assert texts(ask(live, "tales", "", temperature=0)) == ["the cat sleeps today"]
    short = ask(live, "tales", "the", temperature=0, max_tokens=2)
    assert (texts(short), short["choices"][0]["finish_reason"]) == (["cat sleeps"], "length")
    assert ask(live, "endless", "the")["usage"]["completion_tokens"] == 16


def test_what_is_drawn_is_drawn_again_with_its_seed(live: Live) -> None:
    def drawn(**more: object) -> list[str]:
        return texts(ask(live, "tales", "the", max_tokens=1, n=16, **more))

    assert drawn(seed=3) == drawn(seed=3)
    assert set(drawn(seed=3)) == {"cat", "dog"}
    assert set(drawn(seed=3, top_p=0.7)) == {"cat"}
    best = ask(live, "tales", "the", max_tokens=1, n=1, best_of=16, seed=3)
    assert texts(best) == ["cat"]


def test_an_answer_ends_before_a_stop_text(live: Live) -> None:
    answer = ask(live, "endless", "the dog", temperature=0, stop=["today the", "nothing"])
    assert (texts(answer), answer["choices"][0]["finish_reason"]) == (["sleeps "], "stop")


def test_log_probabilities_of_tokens_and_of_others(live: Live) -> None:
    found = ask(live, "tales", "the", temperature=0, logprobs=2)["choices"][0]["logprobs"]
    assert found["tokens"] == ["cat", "sleeps", "today"]
    assert found["text_offset"] == [0, 3, 10]
    assert found["token_logprobs"] == pytest.approx([-0.2877, 0.0, 0.0], abs=1e-3)
    assert found["top_logprobs"][0] == pytest.approx({"cat": -0.2877, "dog": -1.3863}, abs=1e-3)
    assert ask(live, "tales", "the", logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] is None


def test_openais_client_asks_and_streams(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="german", prompt="the cat sleeps", extra_body={"beams": 2})
    assert whole.choices[0].text == "der Kater schläft"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 3
    events = list(
        client.completions.create(
            model="tales",
            prompt=["the cat", "the dog"],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [(choice.index, choice.text) for event in events for choice in event.choices]
    assert len(pieces) > 4
    assert ["".join(text for index, text in pieces if index == place) for place in (0, 1)] == ["sleeps today"] * 2
    ends = [
        (choice.index, choice.finish_reason) for event in events for choice in event.choices if choice.finish_reason
    ]
    assert sorted(ends) == [(0, "stop"), (1, "stop")]
    assert events[-1].usage is not None
    assert events[-1].usage.total_tokens == 2 * (3 + 2)
    with pytest.raises(openai.BadRequestError, match="beams"):
        client.completions.create(model="tales", prompt="the", temperature=1, extra_body={"beams": 2})


def test_a_stream_ends_before_a_stop_text(live: Live) -> None:
    asked = {"model": "endless", "prompt": "the dog", "temperature": 0, "stop": "today the", "stream": True}
    lines = live.client.post("/v1/completions", json=asked).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(event["choices"][0]["text"] for event in events) == "sleeps "
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "stop"


def test_a_client_that_leaves_a_stream_costs_no_more_steps(live: Live) -> None:
    asked = {"model": "endless", "prompt": "the", "max_tokens": 40_000, "stream": True}
    with live.client.stream("POST", "/v1/completions", json=asked) as response:
        next(response.iter_bytes())
    wait_until_idle(live)


def test_a_client_that_leaves_before_its_answer_costs_no_more_steps(live: Live) -> None:
    asked = {"model": "endless", "prompt": ["the", "the cat"], "max_tokens": 40_000, "n": 3}
    with pytest.raises(httpx.ReadTimeout):
        live.client.post("/v1/completions", json=asked, timeout=0.3)
    wait_until_idle(live)


def wait_until_idle(live: Live) -> None:
    """No sequence is written any more, and nobody holds the model."""
    model = live.repository.models["endless"]
    assert model.engine is not None
    end = time.perf_counter() + 5
    while model.engine.occupancy().running or model.requests:
        assert time.perf_counter() < end, "the engine goes on"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_fails_after_the_first_token(live: Live, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    language = live.repository.models["tales"].language
    assert language is not None
    decode, runs = language.slots.decode, 0

    def breaking(*arguments: Any) -> Any:
        nonlocal runs
        runs += 1
        assert runs < 2, "broken"
        return decode(*arguments)

    monkeypatch.setattr(language.slots, "decode", breaking)
    answer = post(live, "tales", "the", temperature=0, stream=stream)
    if not stream:
        assert "failed to run" in message_of(answer, 500)
        return
    *events, last, rest = answer.text.split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["text"] == "cat"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert rest == ""


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_has_passed(live: Live, stream: bool) -> None:
    body = {"model": "tales", "prompt": "the", "stream": stream}
    answer = live.client.post("/v1/completions", json=body, headers={"x-request-timeout": "1e-9"})
    assert "deadline" in message_of(answer, 408)


@pytest.mark.parametrize("model", ["tales", "german"])
def test_a_short_answer_does_not_wait_for_the_long_ones_of_its_batch(
    live: Live, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live.repository.models["german"].batcher, "parallel", 1)
    prompts = ["the cat sleeps", "sleeps today the"] if model == "tales" else ["the", "the cat dog sleeps today"]
    told = [choice for event in stream_of(live, model, prompts, temperature=0) for choice in event["choices"]]
    assert [choice["index"] for choice in told if choice["finish_reason"]] == [0, 1]
    assert told[-1]["index"] == 1


def stream_of(live: Live, model: str, prompt: object, **more: object) -> list[dict[str, Any]]:
    """The events of a stream, which has its end."""
    lines = live.client.post("/v1/completions", json={"model": model, "prompt": prompt, "stream": True, **more}).text
    *events, done, rest = lines.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def joined(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the choices of a stream amount to: text, reason and log-probabilities by index."""
    found: dict[int, dict[str, Any]] = {}
    for choice in [choice for event in events for choice in event["choices"]]:
        whole = found.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": {}})
        assert whole["finish_reason"] is None, "nothing comes behind the end"
        whole["text"] += choice["text"]
        whole["finish_reason"] = choice["finish_reason"]
        for name, values in (choice["logprobs"] or {}).items():
            whole["logprobs"][name] = None if values is None else whole["logprobs"].get(name, []) + values
    return found


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("tales", {"n": 3, "seed": 5}),
        ("tales", {"n": 2, "seed": 2, "logprobs": 2, "echo": False}),
        ("tales", {"prompt": ["the", "the dog"], "echo": True, "seed": 1}),
        ("letters", {"prompt": ["né 猫", "x"], "echo": True, "logprobs": 1, "n": 2, "seed": 1, "max_tokens": 9}),
        ("endless", {"stop": ["today the", "nothing"], "logprobs": 1, "seed": 8, "max_tokens": 9}),
        ("endless", {"stop": "today", "n": 2, "max_tokens": 1, "seed": 1}),
        ("letters", {"n": 4, "seed": 3, "max_tokens": 60, "logprobs": 3}),
        ("letters", {"seed": 4, "response_format": {"type": "regex", "pattern": "né 猫{3}"}, "logprobs": 0}),
        ("letters", {"seed": 4, "max_tokens": 40, "stop": ["a", "b"], "min_tokens": 9, "top_k": 200, "min_p": 0.001}),
    ],
)
def test_a_stream_amounts_to_the_whole_answer(live: Live, model: str, more: dict[str, Any]) -> None:
    asked = {"prompt": "the", "stream_options": {"include_usage": True}, **more}
    *events, last = stream_of(live, model, **asked)
    del asked["stream_options"]
    whole = ask(live, model, **asked)
    streamed = joined(events)
    assert len(streamed) == len(whole["choices"])
    choices = [(c["text"], c["finish_reason"], c["logprobs"] and c["logprobs"]["tokens"]) for c in whole["choices"]]
    found = [(c["text"], c["finish_reason"], c["logprobs"].get("tokens")) for _, c in sorted(streamed.items())]
    # The best of several come first when they are whole.
    assert sorted(map(str, found)) == sorted(map(str, choices))
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {event["id"] for event in events} == {last["id"]}
    assert all("usage" not in event for event in events)


@pytest.mark.parametrize("echo", [False, True])
def test_a_streams_log_probabilities_are_those_of_the_answer(live: Live, echo: bool) -> None:
    asked = {"prompt": "the", "logprobs": 2, "temperature": 0, "echo": echo}
    streamed = joined(stream_of(live, "tales", **asked))[0]["logprobs"]
    assert streamed == ask(live, "tales", **asked)["choices"][0]["logprobs"]


def test_characters_are_streamed_whole(live: Live) -> None:
    form = {"type": "regex", "pattern": "né 猫{3}"}
    events = stream_of(live, "letters", "x", response_format=form)
    assert [event["choices"][0]["text"] for event in events] == ["n", "é", " ", "猫", "猫", "猫", ""]


def test_what_sampling_is_asked_for_is_done(live: Live) -> None:
    assert texts(ask(live, "tales", "the", temperature=0, logit_bias={"6": 5}, max_tokens=1)) == ["dog"]
    assert texts(ask(live, "tales", "the", logit_bias={"6": -100}, max_tokens=1, n=8)) == ["cat"] * 8
    assert texts(ask(live, "tales", "the", top_k=1, max_tokens=1, n=8)) == ["cat"] * 8
    assert texts(ask(live, "tales", "the", min_p=0.5, max_tokens=1, n=8)) == ["cat"] * 8
    # The dog's logit is log 3 below the cat's; what was said counts.
    said = ask(live, "endless", "the", temperature=0, presence_penalty=1.5, max_tokens=6)
    assert texts(said) == ["cat sleeps today the dog sleeps"]
    prompted = ask(live, "endless", "the cat sleeps today the", temperature=0, repetition_penalty=9, max_tokens=1)
    assert texts(prompted) == ["dog"]
    assert ask(live, "tales", "the cat", temperature=0, min_tokens=5)["usage"]["completion_tokens"] >= 5
    assert ask(live, "letters", "the", max_tokens=30, seed=1) != ask(live, "letters", "the", max_tokens=30, seed=2)


def test_an_echo_is_the_prompt_and_the_answer(live: Live) -> None:
    assert texts(ask(live, "letters", "né", echo=True, logit_bias={"97": 100}, max_tokens=3)) == ["néaaa"]
    assert texts(ask(live, "letters", [110, 195, 169], echo=True, logit_bias={"97": 100}, max_tokens=3)) == ["néaaa"]


def test_a_text_is_scored_by_its_echo_as_it_is_where_it_is_written(live: Live) -> None:
    written = ask(live, "tales", "the", temperature=0, logprobs=2, max_tokens=2)["choices"][0]
    text = "the " + written["text"]
    read = ask(live, "tales", text, echo=True, logprobs=2, max_tokens=1)["choices"][0]
    found, expected = read["logprobs"], written["logprobs"]
    assert read["text"].startswith(text)
    assert found["tokens"][:4] == ["[BOS]", "the", *expected["tokens"]]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][2:4] == pytest.approx(expected["token_logprobs"], abs=1e-4)
    for one, other in zip(found["top_logprobs"][2:4], expected["top_logprobs"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert found["text_offset"][:2] == [0, 0]
    assert found["text_offset"][4:5] in ([], [len(text)])
    assert len(found["text_offset"]) == len(found["tokens"]) == len(found["token_logprobs"])


def test_what_a_model_answers_has_its_fingerprint(live: Live) -> None:
    one, other = (ask(live, model, "the")["system_fingerprint"] for model in ("tales", "endless"))
    assert one.startswith("fp_")
    assert one == ask(live, "tales", "the")["system_fingerprint"] != other


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("tales", {"prompt": 3}, "prompt", "str"),
    ("tales", {"prompt": []}, "prompt", "a list of texts"),
    ("tales", {"prompt": ["the", 4]}, "prompt", "a list of texts"),
    ("tales", {"prompt": [4, 99]}, "prompt", "0 to 8"),
    ("tales", {"prompt": [[]]}, "prompt", "at least 1"),
    ("german", {"prompt": [4] * 17}, "prompt", "1 to 16"),
    ("tales", {"prompt": [[4]] * 5000}, "prompt", "at most"),
    ("german", {"prompt": " "}, "prompt", "empty"),
    ("german", {"prompt": "the " * 20}, "prompt", "longer than 16 tokens"),
    ("tales", {"prompt": [4] * 64}, "prompt", "64 tokens"),
    ("tales", {"prompt": "the", "max_tokens": 63}, "max_tokens", "2 in prompt and 63"),
    ("german", {"prompt": "the", "max_tokens": 17}, "max_tokens", "at most 16"),
    ("tales", {"prompt": "the", "max_tokens": 0}, "max_tokens", ">= 1"),
    ("tales", {"prompt": "the", "temperature": -1}, "temperature", ">= 0"),
    ("tales", {"prompt": "the", "top_p": 0}, "top_p", "> 0"),
    ("tales", {"prompt": "the", "n": 17}, "n", "<= 16"),
    ("tales", {"prompt": "the", "n": 3, "best_of": 2}, "n", "best_of"),
    ("german", {"prompt": "the", "n": 3, "beams": 2}, "n", "beams"),
    ("german", {"prompt": "the", "best_of": 3, "beams": 2}, "best_of", "beams"),
    ("german", {"prompt": "the", "temperature": 1, "beams": 2}, "beams", "temperature"),
    ("tales", {"prompt": "the", "stop": ["a"] * 5}, "stop", "4"),
    ("tales", {"prompt": "the", "stop": ""}, "stop", "1"),
    ("tales", {"prompt": "the", "logprobs": 6}, "logprobs", "5"),
    ("tales", {"prompt": "the", "attention": True}, "attention", "none to show"),
    ("tales", {"prompt": "the", "beams": 2}, "beams", "translations"),
    ("german", {"prompt": "the", "echo": True}, "echo", "not offered"),
    ("german", {"prompt": "the", "response_format": {"type": "json_object"}}, "response_format", "not offered"),
    ("tales", {"prompt": "the", "response_format": {"type": "json_object"}}, "response_format", "whole words"),
    ("letters", {"prompt": "x", "response_format": {"type": "regex", "pattern": "("}}, "response_format", "regular"),
    ("letters", {"prompt": "x", "response_format": {"type": "yaml"}}, "response_format", "yaml"),
    ("tales", {"prompt": "the", "min_tokens": 17}, "min_tokens", "at most 16"),
    ("tales", {"prompt": "the", "top_k": -2}, "top_k", ">= -1"),
    ("tales", {"prompt": "the", "presence_penalty": 3}, "presence_penalty", "<= 2"),
    ("tales", {"prompt": "the", "stream": True, "best_of": 2}, "best_of", "streamed"),
    ("tales", {"prompt": "the", "suffix": "x"}, "suffix", "not offered"),
    ("tales", {"prompt": "the", "logit_bias": {"9": 1}}, "logit_bias", "0 to 8"),
    ("tales", {"prompt": "the", "logit_bias": {"5": 101}}, "logit_bias", "<= 100"),
    ("german", {"prompt": "the", "stream": True, "n": 2}, "n", "one translation"),
    ("german", {"prompt": "the", "stream": True, "beams": 2}, "beams", "one translation"),
    ("german", {"prompt": "the", "stream": True, "logprobs": 1}, "logprobs", "stream"),
    ("tales", {"prompt": "the", "stream_options": {}}, "stream_options", "stream"),
    ("days", {"prompt": "good day"}, "model", "/v1/classify"),
]


@pytest.mark.parametrize(("model", "body", "param", "words"), WRONG)
def test_a_request_that_is_wrong_names_its_field(
    live: Live, model: str, body: dict[str, Any], param: str, words: str
) -> None:
    answer = live.client.post("/v1/completions", json={"model": model, **body})
    assert words in message_of(answer, 400)
    assert answer.json()["error"]["param"] == param


def test_a_translation_is_asked_elsewhere_for_a_class(live: Live) -> None:
    answer = live.client.post("/v1/classify", json={"model": "german", "input": "the cat"})
    assert "/v1/completions" in message_of(answer, 400)


def test_tokens_are_counted(live: Live) -> None:
    ask(live, "german", "the dog")
    text = live.client.get("/metrics").text
    assert 'espalier_generation_tokens_total{model="german",version="1"}' in text
    assert 'espalier_requests_total{model="german",outcome="200",route="/v1/completions"}' in text
