"""thinslice chat in a terminal, as a user types into it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.terminals import TerminalProgram, thinslice_in_terminal
from tests.tiny_llm import write_model
from thinslice.cli.terminal import PASTE_END, PASTE_START
from thinslice.units import MIB

# What a paste of 100 kB may add to the peak: the text, its encoding before it is refused, and what
# the editor shows of it. The editor alone took seven times as much for a fifth of that text.
MOST_FOR_A_PASTE = 24 * MIB
PASTE = "many words " * 9000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a context that its answer takes many seconds to fill: what is typed meanwhile
    comes before its end."""
    return write_model(tmp_path_factory.mktemp("lasting") / "tiny.gguf", context=16_384)


@contextmanager
def chat(model: Path, home: Path, *options: str, columns: int = 80) -> Iterator[TerminalProgram]:
    arguments = ("chat", str(model), "--memory", "1GiB", "--temperature", "0", *options)
    with thinslice_in_terminal(*arguments, home=home, columns=columns) as program:
        program.wait_for("/help for commands")
        program.wait_for_prompt()
        yield program


def begin_answer(program: TerminalProgram) -> None:
    """Ask, and wait for the answer's first text."""
    program.type("go\r")
    program.wait_for("go")
    program.wait_for_more()


def endless(program: TerminalProgram) -> None:
    """Let every answer go on to the context's end."""
    program.type("/set ignore_eos on\r")
    program.wait_for_prompt()


def test_a_long_text_takes_little_memory_and_is_kept(model: Path, tmp_path: Path) -> None:
    with chat(model, tmp_path, "--max-tokens", "2") as program:
        program.type("hi\r")
        program.wait_for_prompt()
        before = program.peak_bytes()
        for start, end in (("", ""), ("\x1b[200~", "\x1b[201~")):
            program.type(f"{start}{PASTE}{end}\r")
            program.wait_for("error: ")
            told = program.wait_for_prompt()
            assert "too" in told
            assert "/reset" not in told
            # The text is offered again.
            program.wait_for(f"[text 1: {len(PASTE.strip()):,} characters]")
            assert program.peak_bytes() - before < MOST_FOR_A_PASTE
            program.type("\x03")
            program.wait_for_prompt()


def test_what_is_typed_during_an_answer_is_the_next_input_and_never_runs(
    lasting: Path, tmp_path: Path
) -> None:
    with chat(lasting, tmp_path) as program:
        endless(program)
        begin_answer(program)
        # More than the terminal's queue, while nothing but chat reads it; then an interrupt.
        program.type("/reset\r" + "ahead " * 2000 + "\r")
        program.type("\x03")
        shown = program.wait_for_prompt()
        assert "the context is full" not in shown, "the answer was not stopped"
        assert "ahead" not in shown
        program.type("\x03")
        program.wait_for_prompt()
        # All is dropped. Of what follows, each waits for an Enter of its own.
        program.type("/set max_tokens 4\r")
        program.wait_for_prompt()
        program.type("go on\r/set\r/tokens\r")
        program.wait_for_prompt()
        program.wait_for("/set")
        program.type("\r")
        assert "temperature" in program.wait_for_prompt()
        program.wait_for("/tokens")
        program.type("\r")
        assert "tokens of the context" in program.wait_for_prompt()
        program.type("exit\r")
        assert program.end() == 0


def test_lines_pasted_without_marks_send_the_first_and_offer_the_rest(
    model: Path, tmp_path: Path
) -> None:
    with chat(model, tmp_path, "--max-tokens", "3") as program:
        program.type("/set seed 1\r/set seed 2\r")
        program.wait_for_prompt()
        program.wait_for("/set seed 2")
        program.type("\x03")
        program.wait_for_prompt()
        program.type("/set\r")
        assert "seed                  1" in program.wait_for_prompt()


def test_the_terminal_is_restored_when_chat_is_killed(model: Path, tmp_path: Path) -> None:
    with chat(model, tmp_path) as program:
        os.kill(program.pid, signal.SIGTERM)
        assert program.end() == -signal.SIGTERM
        assert program.raw.rindex("\x1b[?2004l") > program.raw.rindex("\x1b[?2004h")


def test_a_full_context_is_not_the_end(model: Path, tmp_path: Path) -> None:
    with chat(model, tmp_path, "--context", "128") as program:
        endless(program)
        program.type("fill it\r")
        told = program.wait_for_prompt()
        assert "the context is full (128 of 128 tokens)" in told
        assert "/undo takes the last exchange back" in told
        program.type("more\r")
        told = program.wait_for_prompt()
        told = " ".join(told.split())
        assert "the context is full (128 of 128 tokens): the message was not sent" in told
        assert "(/reset starts a new conversation)" in told
        program.wait_for("more")
        # A command takes the place of the message that is offered again.
        program.type("/undo\r")
        assert "0 left" in program.wait_for_prompt()
        program.wait_for("fill it")
        program.type("/")
        program.type("tokens\r")
        assert "tokens of the context" in program.wait_for_prompt()
        # It comes again behind the command, until it is sent or dropped.
        program.wait_for("fill it")
        program.type("\x15/tokens\r")
        assert "tokens of the context" in program.wait_for_prompt()
        program.wait_for("fill it")


def test_history_and_completion_across_starts(model: Path, tmp_path: Path) -> None:
    with chat(model, tmp_path, "--max-tokens", "2") as program:
        program.type("/set temp\t")
        program.wait_for("temperature")
        program.type(" 0.5\r")
        assert "0.5" in program.wait_for_prompt()
        program.type("/bye\r")
        assert program.end() == 0
    with chat(model, tmp_path) as program:
        # The word that left is not kept.
        program.type("\x1b[A")
        program.wait_for("set temperature 0.5")


def test_piped_chat_is_plain(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "thinslice", "chat", str(model), "--quiet", "--max-tokens", "4"],
        input=b"hello\n/tokens\nexit\nnever\n",
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0
    assert b">>>" not in done.stdout
    # The answer is the model's, as it is: of random weights, one byte of it may be an escape.
    assert b"\x1b[" not in done.stdout + done.stderr
    assert done.stderr == b""
    assert done.stdout.count(b"tokens of the context") == 1


def test_a_paste_during_an_answer_is_one_message(lasting: Path, tmp_path: Path) -> None:
    with chat(lasting, tmp_path) as program:
        endless(program)
        begin_answer(program)
        program.type(f"{PASTE_START}first\rsecond\rthird{PASTE_END}\r")
        program.type("\x03")
        shown = program.wait_for_prompt() + program.wait_for("third")
        assert shown.count("typed meanwhile") == 1
        assert "first" in shown
        assert "\x1b[?2004l" not in program.raw, "a terminal would not mark the paste"
        program.type("\x03")
        program.wait_for_prompt()
        program.type("exit\r")
        assert program.end() == 0
