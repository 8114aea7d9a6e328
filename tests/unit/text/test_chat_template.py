"""Chat templates: what they render, and that a hostile one is stopped."""

import ast
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import FrameType

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import thinslice
from thinslice.errors import CheckpointError, RequestError
from thinslice.text.chat_template import ChatTemplate, control_markers

USER = [{"role": "user", "content": "Hi <b> & 'you'"}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\nFour."},
    {"role": "user", "content": "নিশ্চিত? और?"},
]
EMPTY_SYSTEM = [{"role": "system", "content": ""}, *USER]

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
# As SmolLM2-135M-Instruct has it.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Qwen2.5's and MiMo's: a default system prompt, unless a message gives one.
QWEN = """{%- if tools %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
# In the manner of Llama 3.2's: defaults that a caller may set, the system message cut off first.
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.tool_calls | length != 1 %}
        {{- raise_exception("This model only supports single tool-calls at once!") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>' }}{%- endif %}
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
{{ strftime_now('%Y') | int > 2000 }} {{ 4 is divisibleby(num=2) }}
{{ messages | map(attribute='role') | unique | list }}
{% for x in [3, 1, 2] | sort recursive %}{{ x }}{{ loop([]) }}{{ loop.last }}{% else %}-{% endfor %}
{{ 'lazy' if messages | selectattr('role', 'equalto', 'nobody') else 'eager' }}
{% set roles = messages | map(attribute='role') %}{{ roles | list }}{{ roles | list }}
{{ show('a', *messages | map(attribute='role')) }} {{ ('<' | e) + '<' }} {{ '{!r}'.format([1]) }}
{{ ' a '.strip() ~ 'a,b'.split(',', 1)[-1] ~ 'a b'.rsplit()[0] ~ ('xax' | trim('x')) }}
{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}
"""


TEMPLATES = {
    "strict": STRICT,
    "smollm2": SMOLLM2,
    "qwen": QWEN,
    "llama": LLAMA,
    "corners": CORNERS,
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("messages", [USER, CHAT, EMPTY_SYSTEM], ids=["user", "chat", "empty"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_equals_that_of_transformers(
    source: str, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    rendered = template.render(messages, add_generation_prompt=add_generation_prompt)
    by_transformers = render_jinja_template(
        [messages],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert rendered == by_transformers[0][0]


@pytest.mark.parametrize(("source", "default"), [(QWEN, "You are Qwen"), (SMOLLM2, "SmolLM")])
def test_an_empty_system_message_is_not_the_same_as_none(source: str, default: str) -> None:
    template = ChatTemplate(source)
    start = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"
    assert template.render(EMPTY_SYSTEM).startswith(start)
    assert default in template.render(USER)
    assert default not in template.render(EMPTY_SYSTEM)


def test_tokens_come_by_any_name_and_behind_what_a_template_is_given() -> None:
    names = ("pad_token", "image_token", "self", "messages", "tools", "not a name")
    source = "{{ pad_token ~ image_token ~ self is defined ~ (messages | length) ~ tools }}"
    tokens = {name: f"<{name}>" for name in names}
    assert ChatTemplate(source, tokens).render(USER) == "<pad_token><image_token>True1None"


@pytest.mark.parametrize(("told", "shown"), [(None, "unsaid"), (True, "yes"), (False, "no")])
def test_whether_to_think_is_told_to_the_template_in_use(told: bool | None, shown: str) -> None:
    source = (
        "{% if enable_thinking is not defined %}unsaid{% elif enable_thinking %}yes{% else %}no"
        "{% endif %}"
    )
    template = ChatTemplate(source, for_tools=source + "{{ tools | length }}")
    assert template.takes_enable_thinking
    assert template.render([], enable_thinking=told) == shown
    tools = [{"type": "function", "function": {"name": "a"}}]
    assert template.render([], tools=tools, enable_thinking=told) == f"{shown}1"
    silent = ChatTemplate("{{ messages | length }}", for_tools=source)
    assert not silent.used_for(()).takes_enable_thinking
    assert silent.used_for(tools).takes_enable_thinking


@pytest.mark.parametrize(("tag", "writes"), [("<think>", True), ("</think>", True), ("", False)])
def test_a_template_with_a_tag_is_of_a_model_that_thinks(tag: str, writes: bool) -> None:
    assert ChatTemplate(f"{tag}a").writes_thoughts == writes


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
        ("{{ raise_exception('no\\n\\x1b') }}", USER, r"refuses the messages: no\\n\\x1b"),
        (QWEN, [{"role": "user", "content": None}], "cannot render these messages"),
        (QWEN, [{"role": "user"}], "cannot render these messages"),
        (QWEN, [], "cannot render these messages"),
        ("{{ 1 / 0 }}", USER, "cannot render these messages: division by zero"),
        ("{{ messages }}", [{"role": "user", "content": "a" * (17 << 20)}], "too long"),
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
        "{{ " + "1" * 400 + ".0 }}",
        "a" * (65 << 10),
    ],
)
def test_what_does_not_compile_is_a_checkpoint_error(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source)


# Its text would have 2 ** 40 parts.
NESTED_NAMESPACES = (
    "{% set ns = namespace() %}"
    "{% for i in range(40) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}"
)


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
        "{{ joiner.__init__.__globals__ }}",
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
        NESTED_NAMESPACES + "{{ '{!s}'.format(ns.x) }}",
        NESTED_NAMESPACES + "{{ '{0.a!r}'.format(ns.x) }}",
        NESTED_NAMESPACES + "{{ raise_exception(ns.x) }}",
        NESTED_NAMESPACES + "{{ 'a' | replace('a', new=ns.x) }}",
        NESTED_NAMESPACES + "{{ ('a' | e).replace('a', ns.x) }}",
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
WIDE = "{% set big = '語 ' * 3000000 %}"
# An attribute of an attribute, and so on: "a"[0] is "a".
DEEP = "{% set path = '0.' * 9999 ~ '0' %}{% set texts = ['a'] * 20000 %}"
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
    "fuel from nothing": "{% set x = 'a' | indent(-10 ** 9) %}{{ 'a' * 10 ** 8 }}",
    "indented short lines": "{% set big = '語\n' * 3000000 %}{{ big | indent(0) }}",
    "lines": "{% set big = '語\n' * 3000000 %}{{ big.splitlines() | length }}",
    "split at blanks": WIDE + "{{ big.split() | length }}",
    "split at text": WIDE + "{{ big.split(' ') | length }}",
    "title": WIDE + "{{ big | title | length }}",
    "escaped characters": "{% set big = '語' * 2000000 %}{{ big | e | list | length }}",
    "arguments": WIDE + "{{ dict(*big) }}",
    "filter arguments": WIDE + "{{ 1 | default(*big) }}",
    "test arguments": WIDE + "{{ 1 is eq(*big) }}",
    "braces": "{% set big = '{{' * 3000000 %}{{ big.format() | length }}",
    "date": "{% set big = '%c' * 3000000 %}{{ strftime_now(big) }}",
    "search from the right": BIG + "{{ big.rfind('ab' ~ big[:1000000]) }}",
    "split from the right": BIG + "{{ big.rsplit(sep='ab' ~ big[:1000000]) | length }}",
    "strip": BIG + "{{ big.strip('b' * 1000000 ~ 'a') }}",
    "trim": BIG + "{{ big | trim('b' * 1000000 ~ 'a') }}",
    "path of choice": DEEP + "{{ texts | rejectattr(path) | list }}",
    "path of order": DEEP + "{{ texts | sort(attribute=path) }}",
    "path to join": DEEP + "{{ texts | join(attribute=path) }}",
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
MANY_STEPS = ("nested", "loops", "shared", "compared", "macro", "varargs", "hashed", "path")


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
        "{% set many = range(90000) | list %}{{ range(-99999, 0) | select('in', many) | list }}",
    ],
    ids=["comparison", "call", "comparisons", "tests", "choice"],
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


def test_a_template_may_be_rendered_in_the_middle_of_a_rendering() -> None:
    """As from a signal handler: at each line of the first one."""
    messages, long = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "x" * 9000}]
    template = ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    expected, inner = template.render(messages), list[str]()

    def trace(frame: FrameType, event: str, _: object) -> object:
        if event == "line" and frame.f_code.co_filename.endswith("chat_template.py"):
            sys.settrace(None)
            inner.append(template.render(long))
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert template.render(messages) == expected
    finally:
        sys.settrace(before)
    assert len(inner) > 10
    assert set(inner) == {"X" * 9000}


def test_threads_may_share_a_template() -> None:
    template = ChatTemplate(QWEN)
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


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_rendering_takes_less_than_5_ms(source: str) -> None:
    messages = [{"role": role, "content": "word " * 200} for role in ("user", "assistant")] * 10
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})

    def seconds() -> float:
        started = time.thread_time()
        template.render(messages)
        return time.thread_time() - started

    assert min(seconds() for _ in range(9)) < 0.005


UNSAFE = frozenset(
    """* Environment NativeEnvironment NativeTemplate SandboxedEnvironment Template environment
    nativetypes sandbox""".split()  # noqa: SIM905
)


def unsafe_imports(source: str) -> list[str]:
    """What gives a module a Jinja that does not hold templates back."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [one.name for one in node.names if one.name.split(".")[0] == "jinja2"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jinja2":
            found += [one.name for one in node.names if one.name in UNSAFE]
    return found


def test_no_module_has_a_jinja_without_the_sandbox() -> None:
    modules = list(Path(thinslice.__file__).parent.rglob("*.py"))
    assert len(modules) > 10
    assert {str(m): found for m in modules if (found := unsafe_imports(m.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import jinja2",
        "import jinja2.sandbox as safe",
        "from jinja2 import Template",
        "def f():\n    from jinja2.sandbox import SandboxedEnvironment as Harmless",
        "from jinja2.environment import *",
    ],
)
def test_a_jinja_without_the_sandbox_is_found(source: str) -> None:
    assert unsafe_imports(source)


def test_markers_are_found_in_linear_time() -> None:
    for source in ("{#" * (1 << 16), "{##}" * (1 << 16), "<|" * (1 << 16)):
        started = time.process_time()
        assert control_markers(source + "<|a|>") == ["<|a|>"]
        assert time.process_time() - started < 1
