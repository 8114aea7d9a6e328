"""Chat templates: what they render, and that a hostile one is stopped."""

import threading
import time
import tracemalloc

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from thinslice.errors import CheckpointError, RequestError
from thinslice.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "Hi <b> & 'you'"}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\nFour."},
    {"role": "user", "content": "নিশ্চিত? और?"},
]
EMPTY_SYSTEM = [{"role": "system", "content": ""}, *USER]

# In the manner of Qwen's and MiMo's: a default system prompt, unless a message gives one.
CHATML = """
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# In the manner of Llama's and Mistral's: BOS, strict turns, and the reasoning cut out.
STRICT = """{{ bos_token }}{% set ns = namespace(count=0) %}
{% for message in messages -%}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% if (message.role == 'user') != (ns.count % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}{{ message.content.split('</think>')[-1].strip() | trim }}{% endgeneration %}
    {{ eos_token ~ loop.index0 }}
{%- endfor %}
"""
# The corners of the language that templates use.
CORNERS = """{% macro show(x, sep=', ') %}[{{ x | join(sep) }}|{{ varargs }}]{% endmacro %}
{{ show(messages | map(attribute='role'), '; ', 1) }} {{ messages[::-1] | length }}
{{ {'b': 'é<>&', 'a': [1, 2.5, none, true]} | tojson }} {{ {'a': 1} | tojson(indent=2) }}
{{ messages | selectattr('role', 'equalto', 'user') | list | count }} {{ tools is none }}
{% set text %}{{ 'ab' | upper }}-{{ '{}:{:>4}'.format(1, 2) }}{% endset %}{{ text | indent(2) }}
{% for key, value in messages[0].items() %}{{ key }}={{ value | replace('b', 'x') }};{% endfor %}
{{ dict(a=1).get('b', 'none') }} {{ 2 ** 10 }} {{ 7 % 4 }} {{ 'ab' * 2 }} {{ [1] + [2] }}
{{ messages[0].missing is defined }} {{ '' if x is undefined else x }} {{ 1.55 | round(1) }}
{{ strftime_now('%Y') | int > 2000 }} {{ messages | map(attribute='role') | unique | list }}
{% for x in [3, 1, 2] | sort recursive %}{{ x }}{{ loop([]) }}{{ loop.last }}{% else %}-{% endfor %}
{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}
"""


@pytest.mark.parametrize("source", [CHATML, STRICT, CORNERS], ids=["chatml", "strict", "corners"])
@pytest.mark.parametrize("messages", [USER, CHAT, EMPTY_SYSTEM], ids=["user", "chat", "empty"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_equals_that_of_transformers(
    source: str, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    rendered = template.render(messages, add_generation_prompt=add_generation_prompt)
    assert rendered == _compile_jinja_template(source).render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
        bos_token="<s>",
        eos_token="</s>",
    )


def test_an_empty_system_message_is_not_the_same_as_none() -> None:
    template = ChatTemplate(CHATML)
    start = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"
    assert template.render(EMPTY_SYSTEM).startswith(start)
    assert "You are a helpful assistant." in template.render(USER)


def test_a_token_the_tokenizer_lacks_is_undefined() -> None:
    assert ChatTemplate("{{ bos_token }}|{{ eos_token is defined }}").render(USER) == "|False"


def test_the_messages_are_not_changed() -> None:
    messages = [dict(message) for message in CHAT]
    ChatTemplate(STRICT).render(messages)
    assert messages == CHAT


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        (STRICT, CHAT[2:], "refuses the messages: Roles must alternate"),
        ("{{ raise_exception('no ' ~ 1) }}", USER, "refuses the messages: no 1"),
        (CHATML, [{"role": "user", "content": None}], "cannot render these messages"),
        (CHATML, [{"role": "user"}], "cannot render these messages"),
        (CHATML, [], "cannot render these messages"),
        ("{{ 1 / 0 }}", USER, "cannot render these messages: division by zero"),
        ("{{ messages }}", [{"role": "user", "content": "a" * (65 << 20)}], "too long"),
    ],
)
def test_messages_that_do_not_fit_are_a_request_error(
    source: str, messages: list[dict[str, str | None]], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        ChatTemplate(source).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{% for x in messages %}",
        "{{ }",
        "{{ x | no_such_filter }}",
        "{{ 'a' | center(9) }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ " + "not " * 3000 + "1 }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ 1" + "0" * 5000 + " }}",
        "a" * (65 << 10),
    ],
)
def test_what_does_not_compile_is_a_checkpoint_error(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0].clear() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ ''['__class__'].x }}",
        "{{ '{0.__class__.x}'.format(1) }}",
        "{{ messages | map(attribute='__class__') | join }}{{ ''.__class__() }}",
        "{{ self._TemplateReference__context.x }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace(__html__=raise_exception) }}",
        "{% set ns = namespace() %}{% set ns.__html__ = raise_exception %}",
        "{{ (1).to_bytes(9, 'big') }}",
        "{{ 'a'.zfill(9) }}",
        "{{ 'a'.encode() }}",
        "{{ '%9999999999d' % 1 }}",
        "{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.me = ns %}{{ ns | string }}",
        "{% set ns = namespace() %}{% set ns.me = ns %}{{ '' ~ ns }}",
        "{% set ns = namespace() %}{% set ns.me = ns %}{{ [ns] }}",
        "{% set ns = namespace() %}{% set ns.me = ns %}{{ '{}'.format(ns) }}",
    ],
)
def test_a_template_cannot_reach_what_it_may_not(source: str) -> None:
    with pytest.raises(CheckpointError, match="reaches for what it may not"):
        ChatTemplate(source).render(USER)


GROW = "{% set ns = namespace(x=START) %}{% for i in range(99) %}STEP{% endfor %}"


def growing(start: str, step: str) -> str:
    return GROW.replace("START", start).replace("STEP", step)


def compared(made: str) -> str:
    """Grow two equal values whose comparison takes twice as long at every step."""
    steps = "".join(f"{{% set ns.{x} = {made.replace('A', f'ns.{x}')} %}}" for x in "xy")
    return growing("1, y=1", steps) + "{% if ns.x == ns.y %}{% endif %}"


BIG = "{% set big = 'a' * 4000000 %}"
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "loops that choose nothing": "{% for a in range(99999) %}{% for b in range(99999) if false %}"
    "{% endfor %}{% endfor %}",
    "string times": "{{ 'a' * 10 ** 10 }}",
    "times string": "{{ 10 ** 10 * 'a' }}",
    "list times": "{{ [1] * 10 ** 10 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "product": "{{ 2 ** 4000 * 2 ** 4000 }}",
    "sum grows": growing("'a'", "{% set ns.x = ns.x + ns.x %}"),
    "list grows": growing("[1]", "{% set ns.x = ns.x + ns.x %}"),
    "join grows": growing("'a'", "{% set ns.x = ns.x ~ ns.x %}"),
    "block grows": growing("'a'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "shared lists": growing("1", "{% set ns.x = [ns.x, ns.x] %}"),
    "shared tuples": growing("1", "{% set ns.x = (ns.x, ns.x) %}"),
    "shared dicts": growing("1", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
    "shared by dict()": growing("1", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "compared lists": compared("[A, A]"),
    "compared tuples": compared("(A, A)"),
    "compared dicts": compared("{1: A, 2: A}"),
    "compared by dict()": compared("dict(a=A, b=A)"),
    "hashed varargs": "{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else {varargs: 1} }}"
    "{% endmacro %}{{ f(99, 1, 2) }}",
    "slices": BIG + "{% for i in range(99999) %}{% set x = big[1:] %}{% endfor %}",
    "two calls each": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(99) }}",
    "varargs": "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "join filter": BIG + "{{ range(99999) | join(big) }}",
    "join method": BIG + "{{ big.join('b' * 9999) }}",
    "join of one thing": BIG + "{{ ([big] * 9999) | join }}",
    "replace filter": BIG + "{{ big | replace('a', 'bbbbbbbbb') }}",
    "replace method": BIG + "{{ big.replace('a', 'bbbbbbbbb') }}",
    "replaced block": BIG + "{% filter replace('a', 'bbbbbbbbb') %}{{ big }}{% endfilter %}",
    "indent": BIG + "{{ 'a' | indent(10 ** 9) }}",
    "indented lines": "{{ ('a\n' * 999999) | indent(64) }}",
    "indent by text": BIG + "{{ 'a\nb' | indent(big) }}",
    "JSON indent": "{{ [1] | tojson(indent=10 ** 9) }}",
    "JSON separators": BIG + "{{ [1, 2] | tojson(separators=(big, big)) }}",
    "JSON of one thing": BIG + "{{ ([big] * 99) | tojson }}",
    "format width": "{{ '{:9999999999}'.format(1) }}",
    "format width given": "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "round": "{{ 1 | round(10 ** 9) }}",
    "round up": "{{ 1 | round(10 ** 9, 'ceil') }}",
    "characters": BIG + "{{ big | sort }}",
    "split": BIG + "{{ big.split('a') }}",
    "map": BIG + "{{ range(99999) | map('default', big, true) | list }}",
    "large number": BIG + "{{ big | int(0, 16) }}",
    "output": BIG + "{{ big }}" * 9,
}


STOPPED = "too many steps|too large a number|nests too deeply|indents by|asks for|rounds to"


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_is_stopped_in_time(source: str) -> None:
    template = ChatTemplate(source)
    started = time.process_time()
    with pytest.raises(CheckpointError, match=STOPPED):
        template.render(USER)
    assert time.process_time() - started < 3


# These make many small things; following each allocation of theirs takes long.
MANY_STEPS = ("nested", "loops", "shared", "compared", "macro", "varargs", "hashed")


@pytest.mark.parametrize("name", [name for name in HOSTILE if not name.startswith(MANY_STEPS)])
def test_a_hostile_template_is_stopped_before_it_fills_the_memory(name: str) -> None:
    template = ChatTemplate(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            template.render(USER)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


LOOP = "{% for a in range(99999) %}BODY{% endfor %}"


@pytest.mark.parametrize(
    "body",
    [
        LOOP.replace("BODY", "{% if 'ab' in big %}{% endif %}"),
        LOOP.replace("BODY", "{% if big.count('b') %}{% endif %}"),
        "{% if 'ab' in big %}{% endif %}" * 1500,
        "{% if 'ab' is in big %}{% endif %}" * 1500,
    ],
    ids=["comparison", "call", "comparisons", "tests"],
)
def test_time_is_bounded_where_nothing_is_made(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinslice.text.chat_template._MAX_SECONDS", 0.2)
    template = ChatTemplate(BIG + body)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="runs too long"):
        template.render(USER)
    assert time.process_time() - started < 1


def test_a_template_works_again_after_it_was_stopped() -> None:
    template = ChatTemplate("{{ 'a' * (messages | length) ** 9 * 9999 }}")
    with pytest.raises(CheckpointError):
        template.render(USER * 9)
    assert template.render(USER) == "a" * 9999


def test_long_conversations_are_no_hostile_templates() -> None:
    messages = [{"role": role, "content": "word " * 2000} for role in ("user", "assistant")] * 200
    rendered = ChatTemplate(STRICT).render(messages)
    assert rendered.count("word") == 2000 * 400


def test_threads_may_share_a_template() -> None:
    template = ChatTemplate(CHATML)
    expected = {name: template.render([{"role": "user", "content": name}]) for name in "abcdefgh"}
    results: dict[str, set[str]] = {name: set() for name in expected}

    def render_often(name: str) -> None:
        for _ in range(50):
            results[name].add(template.render([{"role": "user", "content": name}]))

    threads = [threading.Thread(target=render_often, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: {text} for name, text in expected.items()}
