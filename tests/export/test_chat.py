"""Chat templates: the same text as transformers makes of them, and no harm from one that is up to something."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from export.processing import chat
from export.processing.chat import Message, render
from export.processing.inputs import BadInput
from tests.export.chat_templates import CHATML, GEMMA, LLAMA_3, MISTRAL, QWEN_2_5, smollm2

TEMPLATES = {
    "chatml": CHATML,
    "llama 3": LLAMA_3,
    "qwen 2.5": QWEN_2_5,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "smollm2": smollm2(),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
messages = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(ROLES),
        content=st.text(st.characters(codec="utf-8"), max_size=30),
        name=st.none() | st.just("Ada"),
        tool_call_id=st.none() | st.just("call-1"),
    ),
    min_size=1,
    max_size=6,
)


def transformers_says(template: str, turns: list[Message], generate: bool) -> str | None:
    """None where it raises."""
    data: Any = [msgspec.to_builtins(turn) for turn in turns]
    try:
        made, _ = render_jinja_template(
            [data], chat_template=template, add_generation_prompt=generate, bos_token="<s>", eos_token="</s>"
        )
    except Exception:
        return None
    return str(made[0])


def ours(template: str, turns: list[Message], generate: bool = True) -> str:
    return render(template, turns, generate=generate, bos="<s>", eos="</s>")


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(turns=messages, generate=st.booleans())
def test_the_text_is_that_of_transformers(name: str, turns: list[Message], generate: bool) -> None:
    expected = transformers_says(TEMPLATES[name], turns, generate)
    if expected is None:
        with pytest.raises(BadInput):
            ours(TEMPLATES[name], turns, generate)
    else:
        assert ours(TEMPLATES[name], turns, generate) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_common_chat_is_rendered_by_every_template(name: str) -> None:
    turns = [Message("user", "Grüß <b> Gott"), Message("assistant", " ja "), Message("user", "2 < 3?")]
    made = ours(TEMPLATES[name], turns)
    assert made == transformers_says(TEMPLATES[name], turns, True)
    assert "Grüß <b> Gott" in made


LANGUAGE = [
    "{{ messages|tojson(indent=2) }}{{ {'é': '<'}|tojson }}",
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem }}{% endfor %}",
    "{% for k, v in {'a': 1, 'b': [2, 3]}.items() if v %}{{ k ~ '=' ~ v ~ none }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{% macro said(m, mark='*') %}{{ mark * 2 + m.content|upper }}{% endmacro %}{{ said(messages[0]) }}",
    "{{ messages|map(attribute='role')|join(', ') }}{{ 'a-b'.split('-')|join('+') }}{{ 'aXa'.replace('a', 'bb') }}",
    "{{ '%s and %03d' % ('one', 2) }}{{ '{:>5}'.format(3) }}{{ 'text'|indent(4, true) }}{{ 7 % 4 ** 2 }}",
    "{% set ns = namespace(found=false) %}{% for i in range(5) %}{% set ns.found = i %}{% endfor %}{{ ns.found }}",
    "{{ messages[-1:] }}{{ messages[0].get('absent', 'x') }}{{ absent }}{{ absent is defined }}",
    "{{ bos_token ~ absent }}{{ eos_token }}{{ tools is none }}",
    "{% filter upper %}{% generation %}said{% endgeneration %}{% endfilter %}{{ dict(a=1)['a'] }}",
    "   {% if true %}  \n  yes\n  {% endif %}\n{#- nothing #}  {{- 'x' -}}  \n",
]


@pytest.mark.parametrize("template", LANGUAGE)
def test_what_else_the_language_has(template: str) -> None:
    turns = [Message("system", "be brief"), Message("user", "<héllo>")]
    expected = transformers_says(template, turns, True)
    assert expected is not None
    assert ours(template, turns) == expected


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
]
HUGE = [
    "{{ 'a' * 10 ** 12 }}",
    "{{ [1] * 10 ** 12 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(x=7) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x.join([ns.x, 'a']) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ '' ~ ns.x }}",
    "{{ '%999999999d' % 3 }}",
    "{{ '%*d' % (999999999, 3) }}",
    "{{ '{:>999999999}'.format(3) }}",
    "{{ '{:>{}}'.format(3, 999999999) }}",
    "{{ 'x'.ljust(10 ** 9) }}",
    "{{ 'x'|center(10 ** 9) }}",
    "{{ messages|tojson(indent=10 ** 9) }}",
    "{{ 'a\n' * 90000|indent(90000) }}",
    "{{ messages|slice(10 ** 9)|list }}",
    "{{ range(10 ** 9)|list }}",
    "{{ lipsum(n=10 ** 9) }}",
    "{{ strftime_now('%99999999d') }}",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
]
BROKEN = [
    "{% for %}",
    "{{ messages[0].absent.absent }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{% set ns = namespace(_x=1) %}",
    "{% include 'x' %}",
    "{{ 'x'|absent }}",
]


@pytest.mark.parametrize("template", ENDLESS + HUGE + BROKEN)
def test_a_template_that_is_up_to_no_good_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    with pytest.raises(BadInput, match="template"):
        ours(template, [Message("user", "hello")])


def test_what_a_template_refuses_is_said_in_its_words() -> None:
    with pytest.raises(BadInput, match="roles must alternate"):
        ours(GEMMA, [Message("assistant", "I begin")])
    with pytest.raises(BadInput, match="line 2"):
        ours("fine\n{% endfor %}", [Message("user", "hello")])
    with pytest.raises(BadInput, match="at least one"):
        ours(CHATML, [])
