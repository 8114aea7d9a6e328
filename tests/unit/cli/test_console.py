"""Text and tables on a terminal of any width, where nothing may be left out; and bars."""

import os
import pty
from collections.abc import Callable

import pytest

from thinslice.cli import console
from thinslice.cli.console import (
    note,
    plain_table,
    print_error,
    print_table,
    progress_bars,
    show_text,
)

PATH = "/home/user/models/" + "m" * 40
ROWS = [("smollm2", "93.81 MiB", PATH), ("org/another", "1.20 GiB", "")]


def shown(monkeypatch: pytest.MonkeyPatch, width: int, show: Callable[[], None]) -> list[str]:
    """What a terminal of so many columns gets, line by line."""
    user, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    with open(terminal, "w") as stream:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(f"sys.{name}", stream)
        for one in (console.out, console.notes, console.err):
            monkeypatch.setattr(one, "_width", None)
        show()
        stream.flush()
        os.write(terminal, b"\0")
        text = b""
        while not text.endswith(b"\0"):  # a terminal gives a line at a time
            text += os.read(user, 4096)
    os.close(user)
    return [line.rstrip() for line in text[:-1].decode().splitlines()]


def show_all() -> None:
    table = plain_table("NAME", "SIZE", "PATH")
    for row in ROWS:
        table.add_row(*row)
    print_table(table)


def test_a_table_that_does_not_fit_comes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 30, show_all)
    assert lines[:2] == ["smollm2", "  SIZE  93.81 MiB"]
    assert lines[-2:] == ["org/another", "  SIZE  1.20 GiB"]
    assert PATH in "".join(line.removeprefix("  PATH").strip() for line in lines)
    assert max(map(len, lines)) <= 30


def test_one_that_fits_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 100, show_all)
    assert lines[0].split() == ["NAME", "SIZE", "PATH"]
    assert lines[1].split() == ["smollm2", "93.81", "MiB", PATH]


@pytest.mark.parametrize("show", [note, print_error, show_text])
def test_lines_break_between_words(
    monkeypatch: pytest.MonkeyPatch, show: Callable[[str], None]
) -> None:
    text = "the model needs 412 MiB and the machine has 300 MiB of them free"
    lines = shown(monkeypatch, 24, lambda: show(text))
    assert len(lines) > 2
    assert max(map(len, lines)) <= 24
    assert " ".join(lines).removeprefix("error: ") == text


@pytest.mark.parametrize("patience_s", [0.0, 60.0])
def test_a_bar_is_shown_for_what_takes_long_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    monkeypatch.setattr(console, "_PATIENCE_S", patience_s)
    monkeypatch.setattr(console.err, "is_interactive", True)  # decided before there is a terminal

    def work() -> None:
        with progress_bars() as progress:
            progress("loading weights", 1 << 20, 1 << 22)

    text = "".join(shown(monkeypatch, 100, work))
    assert ("loading weights" in text and "1.0/4.0 MiB" in text) == (patience_s == 0)
    assert bool(text) == (patience_s == 0)
