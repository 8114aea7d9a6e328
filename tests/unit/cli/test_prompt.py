"""Where a prompt comes from, and that standard input is left alone unless it is asked for."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from thinslice.cli.prompt import LARGEST_INPUT, has_unread_input, read_prompt
from thinslice.errors import ConfigError, RequestError


class Input(io.TextIOWrapper):
    """Standard input with known bytes, which tells whether it was touched."""

    def __init__(self, content: bytes, is_terminal: bool = False) -> None:
        self.raw_bytes = io.BytesIO(content)
        super().__init__(self.raw_bytes)
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("of the file")
    return path


@pytest.mark.parametrize(
    ("prompt", "piped", "has_file", "text", "num_read"),
    [
        ("asked", None, False, "asked", 0),
        ("asked", "-", False, "asked\n\nfrom the pipe", 13),
        ("-", None, False, "from the pipe", 13),
        (None, None, False, "from the pipe", 13),
        ("asked", None, True, "asked\n\nof the file", 0),
        (None, None, True, "of the file", 0),
        ("asked", "-", True, "asked\n\nof the file\n\nfrom the pipe", 13),
        ("-", None, True, "of the file\n\nfrom the pipe", 13),
    ],
)
def test_a_prompt_has_the_parts_that_were_asked_for(
    prompt: str | None,
    piped: str | None,
    has_file: bool,
    text: str,
    num_read: int,
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdin = Input(b"from the pipe")
    monkeypatch.setattr("sys.stdin", stdin)
    assert read_prompt(prompt, piped, (notes,) if has_file else ()) == text
    assert stdin.raw_bytes.tell() == num_read


@pytest.mark.parametrize(
    ("prompt", "piped", "content", "error", "message"),
    [
        ("two", "words", b"", ConfigError, "goes in quotes"),
        ("-", "-", b"", ConfigError, "read once"),
        (None, None, b" \n", RequestError, "the prompt is empty"),
        ("-", None, b"caf\xe9", RequestError, "not UTF-8: byte 0xe9 at 3"),
        ("-", None, b"a" * (LARGEST_INPUT + 1), RequestError, "over 8 MiB"),
    ],
)
def test_what_makes_no_prompt_is_refused(
    prompt: str | None,
    piped: str | None,
    content: bytes,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", Input(content))
    with pytest.raises(error, match=message):
        read_prompt(prompt, piped, ())


def test_a_terminal_is_not_waited_for_and_a_missing_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Input(b"", is_terminal=True))
    with pytest.raises(ConfigError, match="no prompt"):
        read_prompt(None, None, ())
    with pytest.raises(ConfigError, match=r"absent\.txt cannot be read: No such file"):
        read_prompt("asked", None, (tmp_path / "absent.txt",))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_prompt("asked", None, (tmp_path,))


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_bytes(b"\xef\xbb\xbfabc")
    assert read_prompt("asked", None, (notes,)) == "asked\n\nabc"


def test_an_argument_is_the_utf8_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the locale took its bytes for."""
    monkeypatch.setattr("sys.stdin", Input(b""))
    typed = "你好".encode().decode("ascii", "surrogateescape")
    assert read_prompt(typed, None, ()) == "你好"
    with pytest.raises(RequestError, match="the prompt is not UTF-8: byte 0xff at 4"):
        read_prompt("bad \udcff", None, ())


def test_an_empty_pipe_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Input(b""))
    assert read_prompt("Summarise:", "-", ()) == "Summarise:"
    assert "standard input is empty" in capsys.readouterr().err


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard input as a pipe that stays open; the end to write to."""
    reading, writing = os.pipe()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(fileno=lambda: reading))
    yield writing
    os.close(reading)
    os.close(writing)


def test_text_that_nobody_asked_for_is_seen_without_waiting(
    pipe: int, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_unread_input(), "an open pipe without text"
    os.write(pipe, b"text")
    assert has_unread_input()
    with notes.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert has_unread_input()
        file.read()
        assert not has_unread_input()
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert not has_unread_input()
    assert not has_unread_input(), "closed"
