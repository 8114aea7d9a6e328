"""The file system fails at any call of a command: one line, a code, nothing half-written."""

import builtins
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_llm
from thinslice.cli.exit_codes import run_command
from thinslice.memory import measure
from thinslice.store.store import Store

ERRNOS = (errno.EACCES, errno.EIO, errno.ENOSPC, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
# By path, where it lies below the test's own folder; and by descriptor, always.
BY_PATH = ("stat", "lstat", "open", "mkdir", "replace", "unlink", "rmdir", "listdir", "scandir")
BY_DESCRIPTOR = ("fsync", "preadv")
MOST_PER_COMMAND = 10
LOADING = ("--context", "64", "--max-tokens", "2", "--temperature", "0")
COMMANDS = {
    "run": ("run", "MODEL", *LOADING, "--raw", "hi"),
    "run --json": ("run", "MODEL", *LOADING, "--json", "hi"),
    "run packed": ("run", "MODEL", *LOADING, "--dtype", "int8", "hi"),
    "run --file": ("run", "MODEL", *LOADING, "--file", "TEXT"),
    "run --prompts": ("run", "MODEL", *LOADING, "--prompts", "TEXT", "--out", "OUT.jsonl"),
    "chat": ("chat", "MODEL", "--context", "64"),
    "plan": ("plan", "MODEL", "--context", "64"),
    "pack": ("pack", "MODEL", "--dtype", "int8", "--out", "OUT"),
    "compare": ("compare", "MODEL", "MODEL", "--text", "TEXT", "--context", "16"),
    "ls": ("ls",),
    "show": ("show", "MODEL"),
    "rm": ("rm", "org/name"),
    "pull": ("pull", "org/name", "--offline"),
    "doctor": ("doctor",),
}


class Fault:
    """Makes the call with number ``at`` fail; counts the calls."""

    def __init__(self, base: Path, at: int, code: int) -> None:
        self.base, self.at, self.code = str(base), at, code
        self.num_calls = 0

    def wrap(self, function: Callable[..., Any], is_by_path: bool) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            target = args[0] if args else None
            is_ours = not is_by_path
            if isinstance(target, str | os.PathLike):
                is_ours = str(os.fspath(target)).startswith(self.base)
            if is_ours:
                self.num_calls += 1
                if self.num_calls == self.at + 1:
                    name = os.fspath(target) if isinstance(target, str | os.PathLike) else None
                    raise OSError(self.code, os.strerror(self.code), name)
            return function(*args, **kwargs)

        return failing

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        for names, is_by_path in ((BY_PATH, True), (BY_DESCRIPTOR, False)):
            for name in names:
                patch.setattr(os, name, self.wrap(getattr(os, name), is_by_path))
        opening = self.wrap(builtins.open, True)
        patch.setattr(builtins, "open", opening)
        patch.setattr(io, "open", opening)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model, a text and a store, in a process that reads nothing."""
    tiny_llm.write_model(tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and thought\n")
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path / "home"))
    for name in ("_PHASE_S", "_OVERHEAD_S", "_WRITING_S"):
        monkeypatch.setattr(measure, name, 0.001)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield tmp_path


def arguments(command: str, place: Path, out: str) -> list[str]:
    names = {"MODEL": "tiny.gguf", "TEXT": "text.txt", "OUT": out, "OUT.jsonl": f"{out}.jsonl"}
    return [str(place / names[part]) if part in names else part for part in COMMANDS[command]]


def check_outcome(command: str, code: int, errors: str) -> None:
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors, errors
    if command == "doctor":
        assert code in (0, 1)
        assert not lines
        return
    assert code in (0, 2, 3, 4, 5, 6), errors
    assert len(lines) == (code != 0), errors


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_fault_at_any_call_is_one_line_and_leaves_a_place_that_works(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = Fault(place, -1, 0)
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        expected = run_command(arguments(command, place, "first"))
    whole = capsys.readouterr()
    assert expected == 0 or command in ("rm", "pull"), whole.err
    assert fault.num_calls > 0
    step = -(-fault.num_calls // MOST_PER_COMMAND)
    for at in range(0, fault.num_calls, step):
        code = ERRNOS[at // step % len(ERRNOS)]
        out = f"out-{at}"
        with pytest.MonkeyPatch.context() as patch:
            Fault(place, at, code).plant(patch)
            exit_code = run_command(arguments(command, place, out))
        check_outcome(command, exit_code, capsys.readouterr().err)
        # The same again, after the fault has gone, is as good as the first time.
        assert run_command(arguments(command, place, out)) == expected, capsys.readouterr().err
        assert bool(capsys.readouterr().out) == bool(whole.out)
    left = [path for path in place.rglob("*") if path.name.endswith((".part", ".lock"))]
    assert not left
    assert not list(place.rglob(".measuring-*"))


ENVIRONMENTS: dict[str, dict[str, str]] = {
    "no home": {},
    "a home of nobody": {"THINSLICE_HOME": "~nobody-of-this-name/models"},
    "a home that is a file": {"THINSLICE_HOME": "FILE"},
    "a home below a file": {"THINSLICE_HOME": "FILE/below"},
    "a home that is a loop": {"THINSLICE_HOME": "LOOP"},
    "a home with a name too long": {"THINSLICE_HOME": "/" + 300 * "x"},
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_path_needs_no_store_and_what_needs_one_says_so_in_a_line(
    environment: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "file").write_text("")
    (place / "loop").symlink_to(place / "loop")
    for name in ("HOME", "XDG_DATA_HOME", "THINSLICE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENTS[environment].items():
        known = value.replace("FILE", str(place / "file")).replace("LOOP", str(place / "loop"))
        monkeypatch.setenv(name, known)
    if environment == "no home":  # as of a user whom the system does not know
        monkeypatch.setattr(os.path, "expanduser", lambda path: os.fspath(path))
    for command in ("run", "plan", "pack", "compare", "show"):
        code = run_command(arguments(command, place, "out"))
        assert code == 0, (command, capsys.readouterr().err)
    capsys.readouterr()
    assert run_command(arguments("run packed", place, "out")) == 6
    assert capsys.readouterr().err.count("error: ") == 1
    for command in ("ls", "rm", "pull"):
        code = run_command(arguments(command, place, "out"))
        check_outcome(command, code, capsys.readouterr().err)
    assert run_command(["doctor"]) == 1
    assert "model store" in capsys.readouterr().out


def test_a_bug_is_shown_with_its_traceback_and_a_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(store: Store) -> tuple[()]:
        raise KeyError("planted")

    monkeypatch.setattr(Store, "list", broken)
    assert run_command(["ls"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert "error: this is a bug of thinslice: KeyError: 'planted'" in errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError(), 3, "no more memory"),
        (RuntimeError("can't start new thread"), 3, "no more threads"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "no more memory"),
        (
            OSError(errno.EMFILE, "Too many open files", "/a"),
            6,
            "/a cannot be used: Too many open files",
        ),
    ],
)
def test_what_the_system_refuses_is_a_line(
    error: Exception,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(store: Store) -> tuple[()]:
        raise error

    monkeypatch.setattr(Store, "list", refused)
    assert run_command(["ls"]) == code
    errors = capsys.readouterr().err
    assert line in errors
    assert errors.count("\n") == 1
