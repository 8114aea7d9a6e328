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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@contextmanager
def chat(model: Path, home: Path, *options: str, columns: int = 80) -> Iterator[TerminalProgram]:
    arguments = ("chat", str(model), "--memory", "1GiB", "--temperature", "0", *options)
    with thinslice_in_terminal(*arguments, home=home, columns=columns) as program:
        program.wait_for("/help for commands")
        program.wait_for_prompt()
        yield program


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
        assert "seed                1" in program.wait_for_prompt()


def test_the_terminal_is_restored_when_chat_is_killed(model: Path, tmp_path: Path) -> None:
    with chat(model, tmp_path) as program:
        os.kill(program.pid, signal.SIGTERM)
        assert program.end() == -signal.SIGTERM
        assert program.raw.rindex("\x1b[?2004l") > program.raw.rindex("\x1b[?2004h")


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
    assert b"\x1b" not in done.stdout + done.stderr
    assert done.stderr == b""
    assert done.stdout.count(b"tokens of the context") == 1
