"""Conversations and completions as OpenAI's fine-tuning takes them: which files hold some, and what is wrong with one.

A conversation is {"messages": [{"role", "content", "weight"?}, ...]}, a completion {"prompt", "completion"}.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from export.processing.chat import Message, joined
from finetune.data.lines import MOST_LINE_BYTES, Lines, decoded, open_lines
from finetune.data.problems import BadFile
from finetune.data.tables import Table, form_of

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
MOST_MESSAGES = 10_000
# Lines that are looked at to tell what a file holds.
LOOKED_AT = 100
# What OpenAI takes and this server does not learn.
TOOLS = ("tools", "functions", "parallel_tool_calls")
CALLS = ("tool_calls", "function_call")


class Conversation(msgspec.Struct, frozen=True):
    """learned: of each message, whether it is learned to be said: the assistant's, without those of weight 0."""

    messages: tuple[Message, ...]
    learned: tuple[bool, ...]


class Completion(msgspec.Struct, frozen=True):
    """A text, and how it is to go on."""

    prompt: str
    completion: str


Chat = Conversation | Completion


def open_chats(path: Path, filename: str) -> Lines | None:
    """The lines of a JSONL file of conversations; None when it is none."""
    if form_of(filename) != "jsonl":
        return None
    with path.open("rb") as stream:
        first = (stream.readline(MOST_LINE_BYTES).removeprefix(codecs.BOM_UTF8) for _ in range(LOOKED_AT))
        found = any(map(_has_messages, first))
    return open_lines(path) if found else None


def holds_chats(table: Table) -> bool:
    """Whether a table has a column of conversations, or the columns of completions."""
    if {PROMPT, COMPLETION} <= {*table.columns}:
        return True
    return any(isinstance(cell, list) for cell in table.columns.get(MESSAGES, [])[:LOOKED_AT])


def chat_of(cells: Mapping[str, Any]) -> Chat:
    """What a line or a row holds. Raises BadFile saying what is wrong with it."""
    return completion(cells) if {PROMPT, COMPLETION} & {*cells} else conversation(cells)


def conversation(cells: Mapping[str, Any]) -> Conversation:
    """Raises BadFile naming the message and the field that is wrong."""
    for key in cells:
        if key in TOOLS and cells[key] is not None:
            raise BadFile(f"{key}: the calls of tools are not learned; leave them out")
        if key not in (MESSAGES, *TOOLS):
            raise BadFile(f"unknown key {key!r}; a line has {MESSAGES!r} and nothing else")
    messages = cells.get(MESSAGES)
    if not isinstance(messages, list) or not messages:
        raise BadFile(f"{MESSAGES}: not a list of messages")
    if len(messages) > MOST_MESSAGES:
        raise BadFile(f"{MESSAGES}: {len(messages):,} messages; at most {MOST_MESSAGES:,} are taken")
    read = [_message(message, f"{MESSAGES}[{i}]") for i, message in enumerate(messages)]
    roles = [message.role for message, _ in read]
    if ASSISTANT not in roles:
        raise BadFile(f"{MESSAGES}: none is the assistant's, so there is nothing to learn")
    if roles[-1] != ASSISTANT:
        raise BadFile(
            f"{MESSAGES}[{len(roles) - 1}]: the last message is the {roles[-1]}'s; it must be the assistant's"
        )
    if roles[0] == ASSISTANT:
        raise BadFile(f"{MESSAGES}[0]: the first message is the assistant's; it answers nothing")
    if not any(learned for _, learned in read):
        raise BadFile(f"{MESSAGES}: every message of the assistant has weight 0, so there is nothing to learn")
    return Conversation(tuple(message for message, _ in read), tuple(learned for _, learned in read))


def completion(cells: Mapping[str, Any]) -> Completion:
    """Raises BadFile for a prompt or a completion that is no text, or empty."""
    for name in (PROMPT, COMPLETION):
        if not isinstance(cells.get(name), str) or not cells[name].strip():
            raise BadFile(f"the {name} is empty, or no text")
    return Completion(cells[PROMPT], cells[COMPLETION])


def digests(chat: Chat) -> tuple[bytes, bytes]:
    """SHA-256 of what is asked, all before the last answer, and of the whole."""
    if isinstance(chat, Completion):
        return _digest(chat.prompt), _digest(chat)
    return _digest(chat.messages[:-1]), _digest(chat.messages)


def characters(chat: Chat) -> int:
    """Of all texts together."""
    if isinstance(chat, Completion):
        return len(chat.prompt) + len(chat.completion)
    return sum(len(message.content) for message in chat.messages)


def texts(chat: Chat | str) -> list[str]:
    """What is said in it, text by text; of a text that."""
    if isinstance(chat, str):
        return [chat]
    if isinstance(chat, Completion):
        return [chat.prompt, chat.completion]
    return [message.content for message in chat.messages]


def _message(given: Any, where: str) -> tuple[Message, bool]:
    """A message and whether it is learned."""
    if not isinstance(given, dict):
        raise BadFile(f"{where}: not an object with a role and a content")
    fields = {key: value for key, value in given.items() if value is not None}
    if calls := [key for key in CALLS if key in fields]:
        raise BadFile(f"{where}.{calls[0]}: the calls of tools are not learned; leave them out")
    if strange := [key for key in fields if key not in ("role", "content", "weight", "name", "tool_call_id")]:
        raise BadFile(f"{where}: unknown key {strange[0]!r}; a message has role, content, name and weight")
    role = fields.get("role")
    if role not in ROLES:
        raise BadFile(f"{where}.role: {_shown(role)}; it is one of {', '.join(ROLES)}")
    content = _content(fields.get("content"), where)
    for key in ("name", "tool_call_id"):
        if key in fields and not isinstance(fields[key], str):
            raise BadFile(f"{where}.{key}: {_shown(fields[key])}; it is a text")
    weight = fields.get("weight", 1)
    if "weight" in fields and role != ASSISTANT:
        raise BadFile(f"{where}.weight: only the assistant's messages have one")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadFile(f"{where}.weight: {_shown(weight)}; it is 0 or 1")
    message = Message(str(role), content, name=fields.get("name"), tool_call_id=fields.get("tool_call_id"))
    return message, role == ASSISTANT and weight == 1


def _content(content: Any, where: str) -> str:
    """A text, or a list of parts that are texts."""
    if isinstance(content, list):
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise BadFile(f"{where}.content[{i}]: {_shown(kind)}; only parts of type text are learned")
        content = joined([part["text"] for part in content])
    if content is None or (isinstance(content, str) and not content.strip()):
        raise BadFile(f"{where}.content: empty")
    if not isinstance(content, str):
        raise BadFile(f"{where}.content: {_shown(content)}; it is a text")
    return content


def _has_messages(line: bytes) -> bool:
    try:
        return isinstance(decoded(line).get(MESSAGES), list)
    except BadFile:
        return False


def _digest(content: Any) -> bytes:
    return hashlib.sha256(msgspec.json.encode(content)).digest()


def _shown(value: Any) -> str:
    return repr(value)[:80] if value is not None else "missing"
