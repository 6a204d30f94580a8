"""Conversations and completions: read, checked, and what is wrong with one told with its line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet

from export.processing.chat import Message
from finetune.data.chats import Completion, Conversation
from finetune.data.datasets import Dataset, open_dataset
from finetune.data.lines import MOST_LINE_BYTES
from finetune.data.problems import BadFile
from finetune.data.splits import split
from finetune.data.validation import inspect, kind_of, usable
from finetune.data.wanted import CHATS, NOTHING, wanted_of
from finetune.recipe import Chat, CrossEntropy, Data, NextToken, Translation


def chat(*texts: str, system: str | None = None) -> dict[str, Any]:
    """Turns of user and assistant."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


CONVERSATIONS = [chat(f"question {i}", f"answer {i}") for i in range(40)]


def lines(folder: Path, rows: list[Any], name: str = "chats.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def opened(path: Path) -> Dataset:
    return open_dataset(path, path.name, Data(), wanted_of(Chat(), Data()))


def test_conversations_are_read_with_what_is_learned_of_them(tmp_path: Path) -> None:
    weighed = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}],
                "name": "Al",
            },
            {"role": "assistant", "content": "Hello!", "weight": 0},
            {"role": "user", "content": "Bye", "weight": None},
            {"role": "assistant", "content": "Bye.", "weight": 1},
        ]
    }
    path = lines(tmp_path, [*CONVERSATIONS, weighed])
    report = inspect(path, path.name)
    assert (report.kind, report.format, report.items, report.problem_count) == ("chats", "jsonl", 41, 0)
    assert report.columns == ["messages"]
    assert usable(report, Data(), CHATS) == []
    dataset = opened(path)
    assert dataset.content(3) == Conversation(
        (Message("user", "question 3"), Message("assistant", "answer 3")), (False, True)
    )
    assert dataset.content(40) == Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "Hi \nthere", name="Al"),
            Message("assistant", "Hello!"),
            Message("user", "Bye"),
            Message("assistant", "Bye."),
        ),
        (False, False, False, False, True),
    )
    assert dataset.place(40) == "line 41"


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_completions_are_read_from_every_kind_of_table(tmp_path: Path, form: str) -> None:
    rows = [{"prompt": f"Page {i}:", "completion": f" pagina {i}"} for i in range(40)]
    path = tmp_path / f"pairs.{form}"
    if form == "csv":
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    elif form == "jsonl":
        path = lines(tmp_path, rows, path.name)
    else:
        parquet.write_table(Table.from_pylist(rows), path)
    report = inspect(path, path.name)
    assert (report.kind, report.items, report.problem_count) == ("chats", 40, 0)
    assert usable(report, Data(), CHATS) == []
    assert opened(path).content(7) == Completion("Page 7:", " pagina 7"), "white space is part of it"
    pairs = Data(text_column="prompt", translation_column="completion")
    assert kind_of(report, pairs, NOTHING) == "text", "and a translation, or a text, for whoever asks for that"
    assert usable(report, pairs, wanted_of(Translation(), pairs)) == []
    assert usable(report, pairs, wanted_of(NextToken(), pairs)) == []


def test_conversations_in_a_parquet_file_are_conversations(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    weighed = chat("hm", "ha")
    weighed["messages"][1]["weight"] = 1
    parquet.write_table(Table.from_pylist([*CONVERSATIONS, weighed]), path)
    report = inspect(path, path.name)
    assert (report.kind, report.items, report.problem_count) == ("chats", 41, 0)
    assert opened(path).content(40).messages == (Message("user", "hm"), Message("assistant", "ha"))


def wrong(**message: Any) -> dict[str, Any]:
    """A conversation whose last message is so."""
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **message}]}


BROKEN: list[tuple[Any, str]] = [
    ("{", "Input data was truncated; every line is one JSON object"),
    ("", "the line is empty; every line is one JSON object"),
    ("[1]", "Expected `object`, got `array`; every line is one JSON object"),
    ({"messages": []}, "messages: not a list of messages"),
    ({"text": "Hi"}, "unknown key 'text'; a line has 'messages' and nothing else"),
    ({"messages": ["Hi"]}, "messages[0]: not an object with a role and a content"),
    (wrong(role="bot"), "messages[1].role: 'bot'; it is one of system, developer, user, assistant, tool"),
    (wrong(role=None), "messages[1].role: missing; it is one of system, developer, user, assistant, tool"),
    (wrong(content="  "), "messages[1].content: empty"),
    (wrong(content=None), "messages[1].content: empty"),
    (wrong(content=7), "messages[1].content: 7; it is a text"),
    (
        wrong(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[1].content[0]: 'image_url'; only parts of type text are learned",
    ),
    (wrong(weight=0.5), "messages[1].weight: 0.5; it is 0 or 1"),
    (wrong(weight=True), "messages[1].weight: True; it is 0 or 1"),
    (wrong(weight=0), "messages: every message of the assistant has weight 0, so there is nothing to learn"),
    (wrong(name=3), "messages[1].name: 3; it is a text"),
    (wrong(colour="red"), "messages[1]: unknown key 'colour'; a message has role, content, name and weight"),
    (wrong(tool_calls=[{}]), "messages[1].tool_calls: the calls of tools are not learned; leave them out"),
    ({**wrong(), "tools": []}, "tools: the calls of tools are not learned; leave them out"),
    ({**wrong(), "id": 3}, "unknown key 'id'; a line has 'messages' and nothing else"),
    (chat("a question"), "messages: none is the assistant's, so there is nothing to learn"),
    (chat("one", "two", "three"), "messages[2]: the last message is the user's; it must be the assistant's"),
    (
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        "messages[0]: the first message is the assistant's; it answers nothing",
    ),
    (
        {"messages": [{"role": "user", "content": "Hi", "weight": 1}, {"role": "assistant", "content": "Hello"}]},
        "messages[0].weight: only the assistant's messages have one",
    ),
    (chat("x" * 1_000_000, "y"), "the texts have 1,000,001 characters; at most 1,000,000 are taken"),
]


def test_what_is_wrong_is_told_with_its_line(tmp_path: Path) -> None:
    path = lines(tmp_path, [*CONVERSATIONS, *(line for line, _ in BROKEN), chat("and", "one more")])
    report = inspect(path, path.name)
    assert report.items == 41
    assert [problem.place for problem in report.problems] == [f"line {41 + i}" for i in range(len(BROKEN))]
    for problem, (_, message) in zip(report.problems, BROKEN, strict=True):
        assert problem.message == message
    (reason,) = usable(report, Data(), CHATS)
    assert reason.startswith("25 of 66 conversations cannot be used, more than a tenth; the first: line 41: Input data")
    with pytest.raises(BadFile, match=r"25 of 66 items cannot be used, more than a tenth; the first: line 41"):
        opened(path)


def test_a_line_of_another_encoding_or_without_end_is_named(tmp_path: Path) -> None:
    path = lines(tmp_path, CONVERSATIONS)
    with path.open("ab") as stream:
        stream.write(json.dumps(chat("caf\u00e9", "s\u00ec"), ensure_ascii=False).encode("latin-1") + b"\n")
        stream.write(b'{"messages": [' + b" " * MOST_LINE_BYTES + b"\n\n\n")
    report = inspect(path, path.name)
    assert (report.items, [problem.place for problem in report.problems]) == (40, ["line 41", "line 42"])
    assert "at most 16,777,216 are taken" in report.problems[1].message


def test_a_byte_order_mark_and_a_missing_last_line_break_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(one) for one in CONVERSATIONS).encode())
    assert inspect(path, path.name).items == 40
    assert opened(path).content(39).messages[1].content == "answer 39"


def test_what_is_there_twice_is_told_and_a_question_stays_on_one_side(tmp_path: Path) -> None:
    again = chat("question 5", "answer 5")
    again["messages"][1]["weight"] = 1
    path = lines(tmp_path, [*CONVERSATIONS, chat("question 5", "another"), again])
    report = inspect(path, path.name)
    assert (report.items, report.problem_count) == (42, 0)
    assert [(one.place, one.first) for one in report.duplicates] == [("line 42", "line 6")]
    dataset = opened(path)
    for seed in range(10):
        held = {5, 40, 41} & set(split(dataset, Data(validation=0.4), seed).validation.tolist())
        assert held in (set(), {5, 40, 41})


def test_a_file_of_conversations_is_nothing_for_other_objectives_and_says_so(tmp_path: Path) -> None:
    report = inspect(lines(tmp_path, CONVERSATIONS), "chats.jsonl")
    for wanted in (wanted_of(CrossEntropy(), Data()), NOTHING):
        (reason,) = usable(report, Data(), wanted)
        assert "holds conversations, which the objective chat learns" in reason
    table = lines(tmp_path, [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}], "texts.jsonl")
    (reason,) = usable(inspect(table, table.name), Data(), CHATS)
    assert "holds no conversations" in reason
    with pytest.raises(BadFile, match="there are no conversations"):
        opened(table)
    with pytest.raises(BadFile, match="the objective that learns them is chat"):
        open_dataset(tmp_path / "chats.jsonl", "chats.jsonl", Data(), NOTHING)


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    path = lines(tmp_path, [chat(f"question {i} " + "x" * 8000, "answer") for i in range(2000)])
    tracemalloc.start()
    try:
        assert inspect(path, path.name).items == 2000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 5
    finally:
        tracemalloc.stop()
