"""What keys typed ahead stand for, and how they are offered."""

from collections.abc import Iterable

import pytest

from thinslice.cli.terminal import MOST_AHEAD_BYTES
from thinslice.cli.typed_ahead import TypedAhead, typed_text

PASTE = "\x1b[200~pasted\rtext\x1b[201~"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("hello\r", "hello"),
        ("two\rlines\r\n", "two\nlines"),
        ("helpo\x7f\x7flo", "hello"),
        ("\x7f\x7fa", "a"),
        ("first\rwrong\x15right", "first\nright"),
        ("a\x1b[Db\x1b[1;5Cc\x1bOPd", "abcd"),
        (PASTE, "pasted\ntext"),
        ("\x1b[24;80Ra\x04\x00b\x1b", "ab"),
        ("नमस्ते👋", "नमस्ते👋"),
    ],
)
def test_keys_are_text_as_a_terminal_that_edits_lines_gives_it(keys: str, text: str) -> None:
    assert typed_text(keys) == text


class Keys:
    """A terminal on which these come, a piece before each line."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self.pieces = list(pieces)

    def take_ahead(self) -> str:
        return self.pieces.pop(0) if self.pieces else ""

    def take_num_dropped(self) -> int:
        return 0


def typed(*pieces: str) -> TypedAhead:
    return TypedAhead(Keys(pieces))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ("one\r/tokens\rthree", ["one", "/tokens", "three"]),
        (f"before {PASTE} behind\rnext\r", ["before pasted\ntext behind", "next"]),
        ("\r\r\none\r\ntwo\n", ["one", "two"]),
        ("\x1b[200~a paste\runder way\r", ["a paste\nunder way"]),
        ("", []),
    ],
)
def test_messages_are_offered_one_by_one(keys: str, messages: list[str]) -> None:
    ahead = typed(keys)
    assert [ahead.next("") for _ in messages] == messages
    assert ahead.next("") == ""


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ('one\r\rtwo"""\rnext\r', ['one\n\ntwo"""', "next"]),
        ('one\r"""  \rnext', ['one\n"""  ', "next"]),
        ('a """b""" c\rlast', ['a """b""" c\nlast', ""]),
        ('one\r"""', ['one\n"""', ""]),
        ('\x1b[200~one\rtwo"""\x1b[201~\rnext\r', ['one\ntwo"""', "next"]),
        ('one"""\x1b[C\rnext\r', ['one"""', "next"]),
        ('one""x\x7f"\rnext\r', ['one"""', "next"]),
        ('\x1b[200~a"""\rb\x1b[201~\r"""\rnext', ['a"""\nb\n"""', "next"]),
    ],
)
def test_a_text_between_fences_is_offered_whole(keys: str, messages: list[str]) -> None:
    ahead = typed(f'"""\r{keys}')
    assert ahead.next("") == '"""'
    assert ahead.next("", '"""') == messages[0]
    assert ahead.next("") == messages[1]


def test_a_message_that_was_not_sent_comes_first() -> None:
    ahead = typed("one\rtw", "o\r")
    assert ahead.next("unsent") == "unsent"
    assert ahead.next("") == "one"
    assert ahead.next("") == "two"


def test_what_a_command_took_the_place_of_is_offered_again() -> None:
    ahead = typed("one\rtwo\r")
    first = ahead.next("")
    ahead.put_back(f"{first}\nwhole")
    assert [ahead.next("") for _ in range(3)] == ["one\nwhole", "two", ""]


def test_a_message_taken_back_is_offered_again_unless_another_is() -> None:
    ahead = typed()
    for offered, expected in (("second", "second"), ("", "second"), ("first", "first")):
        assert ahead.next(offered) == expected
        ahead.put_back(expected)
    assert ahead.next("") == "first"
    assert ahead.next("") == ""


def test_a_loaded_conversation_is_offered_nothing_of_the_one_before() -> None:
    ahead = typed()
    assert ahead.next("of before") == "of before"
    ahead.put_back("of before")
    assert ahead.next(None) == ""
    assert ahead.next("") == ""


def test_nothing_is_said_to_follow_where_nothing_does(capsys: pytest.CaptureFixture[str]) -> None:
    typed("one\r\r").next("")
    assert "what follows" not in capsys.readouterr().err
    typed("one\rtwo").next("")
    assert "drops it and what follows it" in capsys.readouterr().err


def test_what_is_dropped_is_not_offered() -> None:
    ahead = typed("one\rtwo\r", "three\r")
    assert ahead.next("") == "one"
    ahead.drop()
    assert ahead.next("") == "three"


def test_what_waits_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    ahead = typed("a\r", ("x" * 999 + "\r") * 400)
    assert ahead.next("unsent") == "unsent"
    assert ahead.next("") == "a"
    assert "too many and are not kept" in capsys.readouterr().err
    count = 0
    while ahead.next(""):
        count += 1
    assert count <= MOST_AHEAD_BYTES // 1000 + 1
