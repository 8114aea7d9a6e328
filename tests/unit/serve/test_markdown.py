"""Markdown to safe HTML: what is drawn, what is not, and how long it takes at worst."""

import sys
import tracemalloc
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from thinslice.serve import code
from thinslice.serve.code import LANGUAGES, MAX_CODE, MAX_SECONDS
from thinslice.serve.formula import mathml
from thinslice.serve.markdown import MAX_TEXT, render


def html(text: str) -> str:
    return "".join(render(text, is_whole=True).finished)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a *b* **c** ~~d~~", "<p>a <em>b</em> <strong>c</strong> <s>d</s></p>\n"),
        ("# a", "<h3>a</h3>\n"),
        ("##### a", "<h6>a</h6>\n"),
        ("3. a\n4. b", '<ol start="3">\n<li>a</li>\n<li>b</li>\n</ol>\n'),
        ("<b>a</b>", "<p>&lt;b&gt;a&lt;/b&gt;</p>\n"),
        ("$5 and $10", "<p>$5 and $10</p>\n"),
        ("a \\$b$", "<p>a $b$</p>\n"),
        ("$x^{$", '<p><code class="tex">$x^{$</code></p>\n'),
        ("```\n<b>\n```", '<pre data-language=""><code>&lt;b&gt;\n</code></pre>\n'),
        ("[a](/here)", '<p><a target="_blank" rel="noopener noreferrer nofollow">a</a></p>\n'),
    ],
)
def test_text(text: str, expected: str) -> None:
    assert html(text) == expected


@pytest.mark.parametrize(
    "source",
    [
        r"\frac{a}{b}",
        r"\boxed{x}",
        r"\begin{aligned} a &= b \\ c &= d \end{aligned}",
        r"\begin{cases} 1 & x > 0 \\ 0 & x \le 0 \end{cases}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"\binom{n}{k} \operatorname{rank} A",
        r"\text{if } x \in \mathbb{R}",
        r"\sum_{i=1}^{n} i^2 \quad \int_0^1 x\,dx",
        r"\begin{alignedat}{2} a &= b \end{alignedat}",
    ],
)
@pytest.mark.parametrize("form", ["${}$", "$${}$$", "\\({}\\)", "\\[{}\\]", "$$\n{}\n$$"])
def test_formulas(source: str, form: str) -> None:
    drawn = html(form.replace("{}", source, 1))
    assert drawn.count("<math ") == 1
    assert "&amp;" not in drawn.split("<mrow>", 1)[1]  # an ampersand is no column
    assert 'class="tex"' not in drawn


def test_aligned_columns_meet() -> None:
    drawn = mathml(r"\begin{aligned} a &= b \end{aligned}", is_display=True)
    assert drawn is not None
    assert drawn.index('columnalign="right"') < drawn.index('columnalign="left"')


@pytest.mark.parametrize("source", [r"\frac", "x^{", r"\left(", r"\def\a{\a\a}\a", "x" * 5000, ""])
def test_what_is_no_formula_yet_is_none(source: str) -> None:
    assert mathml(source, is_display=False) is None


def test_a_formula_that_has_no_end_yet_is_no_list() -> None:
    found = render("So\n\n\\[\nx\n- y\n+ z", is_whole=False)
    assert found.finished == []
    assert (
        found.rest
        == '<p>So</p>\n<div class="math"><code class="tex">\\[\nx\n- y\n+ z</code></div>\n'
    )
    assert "<ul>" in html("\\[\nx\n- y\n+ z")


def test_code_is_coloured() -> None:
    assert '<span class="k">def</span>' in html("```python\ndef f(): pass\n```")
    assert "<span" not in html("```unheard-of\ndef f(): pass\n```")
    assert "<span" not in html("```python\n" + "a = 1\n" * (MAX_CODE // 6 + 1) + "```")


def test_code_is_what_it_was() -> None:
    text = "".join(map(chr, range(32, 127))) + "\n\n  é 漢 🙂\n"
    for language in LANGUAGES:
        assert _text(html(f"~~~{language}\n{text}~~~")) == text + "\n", language


def _text(source: str) -> str:
    parts: list[str] = []
    reader = HTMLParser()
    reader.handle_data = parts.append  # type: ignore[method-assign]
    reader.feed(source)
    return "".join(parts)


PIECES = [
    *("a", "b c", "\n", "\n\n", "\r\n", "# ", "- ", "1. ", "> ", "```\n", "$", "$$", "$$\n"),
    *(
        "\\[\n",
        "\\]\n",
        "|a|b|\n",
        "|-|-|\n",
        "***",
        "---\n",
        "===\n",
        "    ",
        "🙂",
        "*",
        "`",
        "~~",
    ),
    *("\\begin{align}\n", "\\end{align}\n", "é", "\t", "<b>"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=25), st.integers(1, 4))
@example(["a", "\n", "#", "b"], 1)
@example(["🙂", "\n\n", "b"], 1)
@example(["a", "\r\n", "\r\n", "b"], 1)
def test_a_text_that_comes_piece_by_piece_ends_as_the_whole(pieces: list[str], size: int) -> None:
    """What is finished stays: as the page does it, each time with what is left."""
    text = "".join(pieces)
    finished: list[str] = []
    begin = 0
    for end in range(0, len(text), size):
        found = render(text[begin:end], is_whole=False)
        finished += found.finished
        begin += len(text[begin:end].encode("utf-16-le")[: 2 * found.taken].decode("utf-16-le"))
    finished += render(text[begin:], is_whole=True).finished
    assert "".join(finished) == html(text)


@given(st.text(alphabet="<>&\"'=/\\$`*_[]()!{}ab:|-#\n\x00\u202e", max_size=60))
def test_no_text_makes_what_may_not_be(text: str) -> None:
    seen: list[tuple[str, list[tuple[str, str | None]]]] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, given: seen.append((tag, given))  # type: ignore[method-assign]
    reader.feed(html(text))
    for tag, attributes in seen:
        assert tag not in ("script", "style", "img", "iframe", "svg", "form", "input", "annotation")
        for name, value in attributes:
            assert not name.startswith("on")
            assert name != "style"
            assert name != "href" or str(value).startswith(("http://", "https://", "mailto:"))


def _filled(piece: str) -> str:
    return (piece * (MAX_TEXT // len(piece) + 1))[:MAX_TEXT]


HARD = [
    *("> ", "[", "[a](", "![", "*a ", "*_", "**a", "`", "$a ", "$$a\n", "$$\n", "\\[\n", "\\(a "),
    *("\\begin{align}\n", "<a", "&", "\\", "|", "|-|\n", "|a|\n|-|\n", "* a\n", "  - a\n", "~~a"),
    *("\n", "===\n", "[a]: b\n", "$a$", "$\\frac12$", "$x_$", "\x00"),
    "```java\n" + "\n" * 500,
]
# Of columns, which short rows are filled up to.
WIDE = "|a" * 2000 + "\n" + "|-" * 2000 + "\n" + "|\n" * 2000


@pytest.mark.parametrize("piece", ["*_", "* a\n", "$a$", "|-|\n", WIDE], ids=repr)
def test_a_hard_text_takes_little_room(piece: str) -> None:
    tracemalloc.start()
    try:
        render(_filled(piece), is_whole=True)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("piece", HARD, ids=repr)
def test_a_hard_text_takes_calls_in_proportion(piece: str) -> None:
    whole = _filled(piece)[: MAX_TEXT // 2]
    assert _num_calls(whole) < 8 * _num_calls(whole[: MAX_TEXT // 8]) + 10_000


def _num_calls(text: str) -> int:
    """Calls of functions in Python and in C: what takes time, and is the same each time."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        render(text, is_whole=True)
    finally:
        sys.setprofile(before)
    return count


def test_colours_end_when_their_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(code, "thread_time", lambda: next(clock) * MAX_SECONDS / 4)
    drawn = html("```python\n" + "def f(): return 1\n" * 20 + "```")
    assert 1 <= drawn.count("<span") < 10
    assert _text(drawn) == "def f(): return 1\n" * 20 + "\n"
