"""Chats as texts: the template that a model's checkpoint brings, rendered as transformers' `apply_chat_template` does.

A template is a program that somebody else wrote. It runs in jinja2's sandbox, reads nothing but the messages, and is
stopped when it takes more than SECONDS of the processor or makes anything that is larger than MOST_CHARACTERS.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, partial, wraps
from typing import Any, cast

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from export.processing.inputs import BadInput

MOST_CHARACTERS = 8_000_000
MOST_ITEMS = 200_000
SECONDS = 2.0
# The largest number a method or a filter is given: a width, a count.
LARGEST = 100_000
WIDEST_INDENT = 100
MOST_BITS = 4096


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a chat. role: "system", "developer", "user", "assistant" or "tool", as far as the template knows it.
    tool_call_id: the call that a tool's answer is for."""

    role: str
    content: str
    name: str | None = None
    tool_call_id: str | None = None


def joined(parts: Sequence[str]) -> str:
    """The content of a message that came in parts, the same in training and in serving."""
    return "\n".join(parts)


def render(template: str, messages: Sequence[Message], *, generate: bool, bos: str, eos: str) -> str:
    """The text of a chat, special tokens included. generate: whether it ends with the beginning of an answer. bos, eos:
    the tokenizer's, as text; empty where it has none.

    Raises BadInput for a template that cannot be compiled, refuses the messages (`raise_exception`), breaks on them, or
    does not come to an end.
    """
    if not messages:
        raise BadInput("a chat has at least one message")
    made = compiled(template)
    tokens = {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text}
    turns = [msgspec.to_builtins(message) for message in messages]
    limits.until = time.thread_time() + SECONDS
    pieces, length = [], 0
    try:
        for piece in made.generate(
            messages=turns, tools=None, documents=None, add_generation_prompt=generate, **tokens
        ):
            pieces.append(piece)
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise TooMuch(f"the text is longer than {MOST_CHARACTERS:,} characters")
    except TooMuch as error:
        raise BadInput(f"the chat template was stopped: {error}") from error
    except Refused as error:
        raise BadInput(f"the chat template refuses these messages: {error}") from error
    except RecursionError as error:
        raise BadInput("the chat template calls itself without end") from error
    except Exception as error:  # a template may fail in as many ways as a program
        raise BadInput(f"the chat template cannot render these messages: {error}") from error
    return "".join(pieces)


@lru_cache(maxsize=64)
def compiled(template: str) -> jinja2.Template:
    """Raises BadInput, naming the line, for what is no template."""
    try:
        return environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise BadInput(f"line {error.lineno} of the chat template: {error.message}") from error
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError) as error:
        raise BadInput(f"the chat template cannot be compiled: {error}") from error


class Refused(jinja2.TemplateError):
    """What a template raises itself."""


class TooMuch(jinja2.TemplateError):
    """A limit is passed."""


class Limits(threading.local):
    """until: the processor time of this thread at which its template is stopped."""

    until = 0.0


limits = Limits()


def tick() -> None:
    if time.thread_time() > limits.until:
        raise TooMuch(f"it takes longer than {SECONDS:g} s")


def size(value: Any) -> int:
    """Characters of a value as text, roughly. Raises TooMuch for more than MOST_ITEMS of them in lists in lists: these
    may be few in memory and without end as text."""
    total, items, open_values = 0, 0, [value]
    while open_values:
        found = open_values.pop()
        if isinstance(found, str):
            total += len(found)
        elif isinstance(found, Mapping):
            open_values += [part for pair in found.items() for part in pair]
        elif isinstance(found, list | tuple | set | frozenset):
            open_values += found
        else:
            total += 1
        items += 1
        if items + len(open_values) > MOST_ITEMS:
            raise TooMuch(f"it makes a list of more than {MOST_ITEMS:,} items")
    return total + items


def bounded(characters: int) -> None:
    if characters > MOST_CHARACTERS:
        raise TooMuch(f"it makes something larger than {MOST_CHARACTERS:,} characters")


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with limits: every round of a loop and every call looks at the clock, and what may make large
    things of small ones is measured first."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        found: nodes.Template = Measured().visit(super()._parse(source, name, filename))
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        tick()
        if operator == "+":
            bounded(size(left) + size(right))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int) and isinstance(one, str | list | tuple):
                    bounded(size(one) * max(other, 0))
        elif operator == "%" and isinstance(left, str):
            formatted(left, right)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            factor = right if operator == "**" else 1
            if max(left.bit_length(), 1) * abs(factor) + right.bit_length() > MOST_BITS:
                raise TooMuch("it makes numbers that are too large")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *arguments: Any, **options: Any) -> Any:
        tick()
        text = getattr(function, "__self__", None)
        if isinstance(text, str):
            measure(function.__name__, text, arguments, options)
        return super().call(context, function, *arguments, **options)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        made = super().wrap_str_format(value)
        if made is None:
            return None

        @wraps(made)
        def measured(*arguments: Any, **options: Any) -> str:
            measure("format", value.__self__, arguments, options)
            return made(*arguments, **options)

        return measured


class Measured(NodeTransformer):
    """Puts what is looped over, and what is joined by `~`, through filters of ours."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = filtered(node.iter, "counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:
        self.generic_visit(node)
        node.nodes = [filtered(part, "shown") for part in node.nodes]
        return nodes.Concat([filtered(nodes.List(node.nodes, lineno=node.lineno), "concatenated")], lineno=node.lineno)


def filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, [], [], None, None, lineno=node.lineno)


def measure(name: str, value: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Before a method of a text, or a filter, is called. Raises TooMuch where its result might be too large."""
    given = [*arguments, *options.values()]
    if any(isinstance(number, int) and abs(number) > LARGEST for number in given):
        raise TooMuch(f"{name} is given a number above {LARGEST:,}")
    bounded(size(value) + sum(map(size, given)))
    texts = [part for part in given if isinstance(part, str)]
    if name == "replace" and isinstance(value, str) and len(texts) >= 2:
        bounded(len(value) + value.count(texts[0]) * len(texts[1]))
    elif name == "join":
        items = given[0] if isinstance(value, str) and given else value
        separator = value if isinstance(value, str) else "".join(texts)
        if isinstance(items, list | tuple | str):
            bounded(size(items) + len(items) * len(separator))
    elif name == "format" and isinstance(value, str):
        formatted(value, given)
    elif name == "translate":
        raise TooMuch("translate is not offered")
    elif name in ("indent", "tojson") and any(width > WIDEST_INDENT for width in widths(given)):
        raise TooMuch(f"an indent is at most {WIDEST_INDENT} wide")


def widths(values: Sequence[Any]) -> list[int]:
    return [len(value) if isinstance(value, str) else value for value in values if isinstance(value, str | int)]


def formatted(pattern: str, values: Any) -> None:
    """Before `pattern` is filled with values. Widths come as digits, or as values: `*`, or braces inside of braces."""
    if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{", pattern):
        raise TooMuch("its format is too wide")
    fields = pattern.count("%") + pattern.count("{")
    bounded(len(pattern) + fields * (LARGEST // 10 + size(values)))


def counted(items: Any) -> Any:
    """What a loop goes over: a list of known length stays one, for `loop.length` and `loop.last`."""
    return Counted(items) if isinstance(items, list | tuple | str | Mapping) else counting(items)


class Counted:
    """Looks at the clock with every item."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Any:
        return counting(self.items)


def counting(items: Any) -> Any:
    for item in items:
        tick()
        yield item


def shown(value: Any) -> Any:
    bounded(size(value))
    return value


def concatenated(parts: list[Any]) -> str:
    bounded(size(parts))
    return "".join(map(str, parts))


def finalized(value: Any) -> Any:
    """What is put out. A list in lists in lists is far longer as text than in memory."""
    if not isinstance(value, str):
        bounded(size(value))
    return value


def careful(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is measured before it is called. What jinja2 hands in before the value stays where it was."""
    behind = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def measured(*arguments: Any, **options: Any) -> Any:
        tick()
        measure(name, arguments[behind] if len(arguments) > behind else None, arguments[behind + 1 :], options)
        return function(*arguments, **options)

    return measured


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja2's own filter escapes what HTML would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise Refused(message)


def strftime_now(form: str) -> str:
    if len(form) > LARGEST or re.search(r"\d{4}", form):
        raise TooMuch("its format is too wide")
    return datetime.now().strftime(form)


class Names(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*arguments: Any, **options: Any) -> None:
        given = dict(*arguments[1:], **options)
        for name in given:
            no_underscore(name)
        Namespace.__init__(arguments[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        no_underscore(name)
        Namespace.__setitem__(self, name, value)


def no_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no {name!r}: names do not begin with an underscore")


class GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %} marks, for training elsewhere, what an assistant says: it is put out."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller: Macro) -> str:
        return str(caller())


@lru_cache(maxsize=1)
def environment() -> Sandbox:
    """What transformers gives a template, no more."""
    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols], finalize=finalized)
    made.filters["tojson"] = tojson
    made.filters = {name: careful(name, function) for name, function in made.filters.items()}
    made.filters |= {"counted": counted, "shown": shown, "concatenated": concatenated}
    made.globals.pop("lipsum")
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": partial(dict),
        "namespace": Names,
    }
    return made
