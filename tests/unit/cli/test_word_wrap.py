"""Lines end between words, and no character is lost, moved or split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wcwidth import iter_graphemes, wcswidth

from thinslice.cli.word_wrap import WordWrap


def wrapped(pieces: list[str], width: int) -> str:
    wrap = WordWrap(lambda: width)
    return "".join([*map(wrap.push, pieces), wrap.finish()])


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("one two three", 8, "one two\nthree"),
        ("one two three", 7, "one two\nthree"),
        ("one\ntwo", 20, "one\ntwo"),
        ("a b\n\nc", 20, "a b\n\nc"),
        ("    code here", 40, "    code here"),
        ("exactly8 next", 8, "exactly8\nnext"),
        ("abcdefghij", 4, "abcd\nefgh\nij"),
        ("a abcdefghij", 4, "a\nabcd\nefgh\nij"),
        ("a\tb", 20, "a       b"),
        ("好好好好", 5, "好好\n好好"),
        ("ab 好好", 5, "ab 好\n好"),
        ("e\u0301e\u0301 e\u0301e\u0301", 3, "e\u0301e\u0301\ne\u0301e\u0301"),
        ("שלום עולם", 6, "שלום\nעולם"),  # noqa: RUF001
        ("नमस्ते दुनिया", 6, "नमस्ते\nदुनिया"),
        ("👩‍👩‍👧👩‍👩‍👧", 3, "👩‍👩‍👧\n👩‍👩‍👧"),
        ("a\r\nb\rc", 9, "a\nbc"),
    ],
)
def test_lines_end_between_words(text: str, width: int, expected: str) -> None:
    assert wrapped([text], width) == expected
    assert wrapped(list(text), width) == expected


ALPHABET = "ab \n\té́好한👩‍🇩🇪नम्स्तेשלوم"


@given(
    st.text(st.sampled_from(ALPHABET), max_size=80),
    st.integers(2, 12),
    st.lists(st.integers(1, 7), min_size=1, max_size=6),
)
def test_no_line_is_too_wide_no_cluster_is_split_and_nothing_is_lost(
    text: str, width: int, sizes: list[int]
) -> None:
    pieces, at = [], 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    shown = wrapped(pieces, width)
    assert shown == wrapped([text], width)
    blank = str.maketrans("", "", " \n\t")
    assert shown.translate(blank) == text.translate(blank)
    clusters = [one for one in iter_graphemes(text) if one.strip()]
    for line in shown.split("\n"):
        is_one_cluster = len(list(iter_graphemes(line))) == 1
        assert is_one_cluster or sum(map(wcswidth, iter_graphemes(line))) <= width
    rest = shown
    for cluster in clusters:
        assert cluster in rest
        rest = rest[rest.index(cluster) + len(cluster) :]


def test_a_word_is_written_when_its_end_is_known() -> None:
    wrap = WordWrap(lambda: 20)
    assert wrap.push("Hel") == ""
    assert wrap.push("lo wor") == "Hello"
    assert wrap.push("ld\n") == " world\n"
    assert wrap.finish() == ""


def test_a_cluster_without_end_is_not_held_back_for_ever() -> None:
    wrap = WordWrap(lambda: 20)
    for _ in range(100):
        wrap.push("e" + "\u0301" * 100)
    assert len(wrap._tail) + sum(map(len, wrap._word)) < 2500
    wrap = WordWrap(lambda: 20)
    shown = "".join(wrap.push("\u0301" * 100) for _ in range(100))
    assert len(shown) + len(wrap.finish()) == 10_000
